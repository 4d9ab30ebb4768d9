"""A search as a YAML file: the bench, the problem, and how long to search."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from evaluators.bench_config import BenchConfig
from evaluators.ranking import MAP_DROP, OBJECTIVES, TRAIN_STEP, Problem
from spaces.detectors.own import located
from spaces.detectors.published import weights_file
from spaces.documents import refused
from spaces.errors import InputError

_LIMIT = re.compile(r"(max_|min_)?(\w+?)\s*(<=|>=)\s*([-+.\deE]+)")
_IMPLIED = {"max_": "<=", "min_": ">="}
_PATHS = ("checkpoint", "data.root", "data.fit", "data.select", "data.report")
_CLASSES = ("model", "search.sampler")
"""Both are looked for beside the configuration first, then in the working directory."""

_REMEDIES = {
    "checkpoint": "name the weights here or with --checkpoint: a file, or COCO_V1",
    "size": "write it as [height, width] in pixels",
}
"""Where a field is missing, or is no list, and how to write it would not be clear."""

KEEP = 0.5
USUAL_RUNGS = (0.0, 1 / 3)
"""Shares of the epochs: one-shot, short."""


class SearchSettings(BaseModel):
    """How a search is run.

    Attributes:
        trials: of the study, in all runs together; the base is the first.
        workers: processes that evaluate candidates, each with the bench's number of threads.
        sampler: see `search.strategy`.
        seeds: begin with solutions of the solver over measured sensitivities.
        rungs: stop candidates in the middle of their training; see `search.rungs`. True for the usual rungs
            (before training and after a third of it), or the shares of the epochs after which to look, such
            as `[0, 0.25, 0.5]`. By default the usual ones where candidates are trained for 2 epochs or more.
        keep: share of the candidates of a rung that go on; 1 writes their figures down and stops nobody.
        warm_start: name of another study in the same database to begin with; see `search.warm_start`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    trials: int = Field(default=40, ge=1)
    workers: int = Field(default=1, ge=1)
    sampler: str = "front"
    seeds: bool = True
    rungs: bool | tuple[float, ...] | None = None
    keep: float = Field(default=KEEP, gt=0.0, le=1.0)
    warm_start: str | None = None

    @field_validator("rungs")
    @classmethod
    def _shares(cls, rungs: bool | tuple[float, ...] | None) -> bool | tuple[float, ...] | None:
        if isinstance(rungs, tuple) and not (rungs and all(0.0 <= share < 1.0 for share in rungs)):
            raise InputError("search.rungs", list(rungs), "write shares of the epochs: 0 or more, below 1")
        return rungs


class SearchConfig(BenchConfig):
    """Everything that a configuration file may say; the bench's fields are at its top level.

    Attributes:
        name: of the study; that of the file where it is not given.
        search: how long, and with what.
        problem: objectives and limits.
        keep_mb: limit of the model files on disk, MB; the front and the base are always kept.
    """

    name: str
    search: SearchSettings = SearchSettings()
    problem: Problem = Problem()
    keep_mb: float = Field(default=2000.0, gt=0.0)

    @field_validator("problem")
    @classmethod
    def _several_objectives(cls, problem: Problem) -> Problem:
        if len(problem.objectives) < 2:
            raise InputError("problem.objectives", list(problem.objectives), "name at least two")
        return problem

    @model_validator(mode="after")
    def _trained_where_steps_count(self) -> SearchConfig:
        asked = [name for name in (*self.problem.objectives, *self.problem.limits) if name == TRAIN_STEP]
        if asked and self.finetune.epochs == 0:
            raise InputError("problem", TRAIN_STEP, "needs finetune.epochs of at least 1")
        return self

    @property
    def rungs(self) -> tuple[int, ...]:
        """Epochs of a candidate's training after which it may be stopped; empty where it never is.

        Raises:
            InputError: rungs are asked for, but candidates are not trained.
        """
        epochs, asked = self.finetune.epochs, self.search.rungs
        if asked is None:
            asked = epochs >= 2
        if asked is False:
            return ()
        if epochs == 0:
            raise InputError("search.rungs", asked, "needs finetune.epochs of at least 1")
        shares = USUAL_RUNGS if asked is True else asked
        return tuple(sorted({min(round(share * epochs), epochs - 1) for share in shares}))

    @property
    def bench(self) -> BenchConfig:
        """What workers need of it."""
        return BenchConfig(**{name: getattr(self, name) for name in BenchConfig.model_fields})


def load_config(
    path: Path, overrides: Mapping[str, Any] | None = None, needs_weights: bool = True
) -> SearchConfig:
    """Read a YAML file.

    Args:
        path: of the file. Relative paths in it are looked for beside it, then in the working directory.
        overrides: values by dotted field, such as `{"search.trials": 100}`; those that are None are left.
        needs_weights: False where an exported model is looked at; a file without a checkpoint will do then.

    Raises:
        InputError: no such file, no YAML, or the first field that is wrong.
    """
    document = _read(path)
    for field in _PATHS:
        _change(document, field, partial(_beside, path.parent, field))
    for field in _CLASSES:
        _change(document, field, partial(located, folder=path.parent))
    _resolve_target(document, path.parent)
    document.setdefault("name", path.stem)
    changes = dict(overrides or {})
    _spelled_checkpoint(document, path)
    if document.get("checkpoint") is None:
        document.pop("checkpoint", None)
        if not needs_weights:
            changes["checkpoint"] = os.devnull
    if not document.get("data"):
        changes = {"data": {}, **changes}
    return changed_config(document, changes, str(path))


def changed_config(document: Mapping[str, Any], overrides: Mapping[str, Any], source: str) -> SearchConfig:
    """A configuration from plain data with overrides as in `load_config`.

    Raises:
        InputError: as `parse_config`.
    """
    changed = dict(document)
    for field, value in overrides.items():
        if value is not None:
            _put(changed, field, value)
    return parse_config(changed, source)


def parse_config(document: Mapping[str, Any], source: str) -> SearchConfig:
    """A configuration from plain data, its paths made absolute.

    Raises:
        InputError: the first field that is wrong, as `source: field`.
    """
    try:
        config = SearchConfig.model_validate(document)
    except ValidationError as error:
        raise refused(error, source, SearchConfig, _REMEDIES) from None
    data = config.data.model_copy(update={"root": _absolute(config.data.root)})
    return config.model_copy(
        update={
            "data": data,
            "checkpoint": _absolute(weights_file(config.model, config.checkpoint.expanduser())),
            "cache": _absolute(config.cache),
            "target": _absolute_target(config.target),
        }
    )


def read_limits(limits: list[str]) -> dict[str, Any]:
    """Command line limits such as `latency_ms<=8` as overrides of a configuration.

    Raises:
        InputError: one that is not written like this; names and bounds are checked by `Problem`.
    """
    overrides: dict[str, Any] = {}
    for text in limits:
        match = _LIMIT.fullmatch(text.strip())
        try:
            prefix, name, operator, bound = match.groups("") if match else ("",) * 4
            field, limit = f"problem.limits.{name}", [operator, float(bound)]
        except ValueError:
            raise InputError("--limit", text, "write it as 'latency_ms<=8' or 'map>=30'") from None
        if match and name not in (*OBJECTIVES, MAP_DROP):
            raise InputError("--limit", text, f"choose a figure: {', '.join((*OBJECTIVES, MAP_DROP))}")
        if _IMPLIED.get(prefix, operator) != operator:
            raise InputError("--limit", text, f"contradicts itself; write {name}<={bound} or {name}>={bound}")
        if field in overrides:
            raise InputError("--limit", text, f"{name} already has a limit")
        overrides[field] = limit
    return overrides


_MERGE = "tag:yaml.org,2002:merge"


class _TwiceError(yaml.constructor.ConstructorError):
    """A field is there twice, the first of which YAML would forget without a word."""


class _Loader(yaml.SafeLoader):
    """Reads plain data, no field of which is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)  # a key may be a list, which is refused as such
            if name in seen and key.tag != _MERGE:
                raise _TwiceError(None, None, f"{name} is there twice", key.start_mark)
            seen.add(name)
        return dict(super().construct_mapping(node, deep))


def _read(path: Path) -> dict[str, Any]:
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise InputError("config", str(path), f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError("config", str(path), "is no text file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        twice = f": {error.problem}" if isinstance(error, _TwiceError) else ""
        raise InputError("config", str(path), f"is no YAML{where}{twice}") from None
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise InputError("config", str(path), "must hold fields, such as 'model: yolox_nano'")
    return document


def _change(document: dict[str, Any], field: str, change: Callable[[str], str]) -> None:
    """Change a dotted field where it is a text."""
    *parents, last = field.split(".")
    place: Any = document
    for key in parents:
        place = place.get(key) if isinstance(place, dict) else None
    if isinstance(place, dict) and isinstance(place.get(last), str):
        place[last] = change(place[last])


def _beside(folder: Path, field: str, value: str) -> str:
    beside = folder / Path(value).expanduser()
    # Names of annotations (`fit: train`) are no paths; a folder that happens to be called so does not count.
    is_path = field in ("checkpoint", "data.root") or beside.is_file()
    return str(beside) if beside.exists() and is_path else value


def _resolve_target(document: dict[str, Any], folder: Path) -> None:
    """A description beside the configuration takes the place of one in the working directory."""
    kind, _, file = str(document.get("target", "")).partition(":")
    beside = folder / Path(file).expanduser()
    if file and beside.is_file():
        document["target"] = f"{kind}:{beside}"


def _spelled_checkpoint(document: dict[str, Any], path: Path) -> None:
    """`weights: COCO_V1` says the same as `checkpoint: COCO_V1`."""
    if "weights" in document:
        if document.get("checkpoint") is not None:
            raise InputError(f"{path}: weights", document["weights"], "there is a checkpoint, too; keep one")
        document["checkpoint"] = document.pop("weights")


def _absolute_target(target: str) -> str:
    """Workers have working directories of their own."""
    kind, _, file = target.partition(":")
    return f"{kind}:{_absolute(Path(file))}" if file else target


def _put(document: dict[str, Any], field: str, value: Any) -> None:
    *parents, last = field.split(".")
    place = document
    for key in parents:
        inner = place.get(key)
        place[key] = dict(inner) if isinstance(inner, Mapping) else {}
        place = place[key]
    if parents == ["problem", "limits"]:
        for spelling in (f"max_{last}", f"min_{last}"):
            place.pop(spelling, None)
    place[last] = value


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.expanduser().absolute()
