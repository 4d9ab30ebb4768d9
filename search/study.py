"""A study: the Optuna study, what it was made for, and where its files are. Resuming needs nothing else."""

from __future__ import annotations

import itertools
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import unquote, urlparse

import optuna
from optuna.artifacts import FileSystemArtifactStore
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection

from evaluators.jobs import trial_folder
from search.storage import DEFAULT_URL, mask_url, open_storage
from search.trials import JOB_PREFIX
from spaces.errors import InputError

Fingerprint: TypeAlias = Mapping[str, str | int | float | bool | None]
"""What a result depends on: detector, base weights hash, data, space, target signature, budget, ..."""
Direction: TypeAlias = Literal["maximize", "minimize"]

CONFIG = "config"
"""Study attribute: the configuration that the study was last opened with."""
FINGERPRINT = "fingerprint"
SIGNATURE = "target "
"""Begins the fingerprint's keys of the target's signature; `target` itself is its name."""
ARTIFACT_STORE = "artifact_store"
_NAME = re.compile(r"[\w.+-][\w.+ -]{0,99}")


@dataclass(frozen=True)
class SearchStudy:
    """An open study.

    Attributes:
        optuna: the Optuna study; its metric names are those of the objectives.
        artifacts: folder of the model files, `trial_folder(number)` within it for each trial.
        shown_url: the storage URL as it may be shown, the password masked.
    """

    optuna: optuna.Study
    artifacts: Path
    shown_url: str

    @property
    def name(self) -> str:
        return self.optuna.study_name

    @cached_property
    def objectives(self) -> dict[str, Direction]:
        """Direction by name, in the order of the values of a trial; never changes."""
        names = self.optuna.metric_names or [str(i) for i in range(len(self.optuna.directions))]
        return {
            name: "maximize" if direction == StudyDirection.MAXIMIZE else "minimize"
            for name, direction in zip(names, self.optuna.directions, strict=True)
        }

    @property
    def fingerprint(self) -> dict[str, Any]:
        return dict(self.optuna.user_attrs.get(FINGERPRINT, {}))

    @property
    def store(self) -> FileSystemArtifactStore:
        """For small files shown in the dashboard (pictures, notes)."""
        return FileSystemArtifactStore(self.artifacts)

    def trial_folder(self, number: int) -> Path:
        """Where the files of trial `number` belong; not made here."""
        return trial_folder(self.artifacts, number)

    def job_results(self) -> dict[str, dict[str, Any]]:
        """Results of the preparatory jobs that succeeded, by job name."""
        stored = self.optuna.user_attrs
        return {
            key.removeprefix(JOB_PREFIX): value["result"]
            for key, value in stored.items()
            if key.startswith(JOB_PREFIX) and isinstance(value, dict) and "result" in value
        }


def open_study(
    name: str,
    fingerprint: Fingerprint,
    objectives: Mapping[str, Direction],
    *,
    url: str = DEFAULT_URL,
    artifacts: Path | None = None,
    new_reference: bool = False,
) -> SearchStudy:
    """Open study `name`, or create it.

    Args:
        name: unique within the database.
        fingerprint: compared with the one of an existing study; every difference refuses it.
        objectives: two or more, direction by name, e.g. `{"map": "maximize", "latency_ms": "minimize"}`.
        url: SQLAlchemy URL of the database.
        artifacts: folder of the model files; default: where the study has them, for a new one
            `artifacts/<name>` beside the SQLite file (`runs/artifacts/<name>` for a server).
        new_reference: let the target's signature differ; see `search.reference`.

    Raises:
        InputError: unusable storage, a study made for something else (what differs is listed), or a
            study that is not ours.
    """
    if not _NAME.fullmatch(name):
        raise InputError("study", name, "use letters, digits, '-', '_', '.', '+' (at most 100 characters)")
    if len(objectives) < 2:
        raise InputError("objectives", list(objectives), "name at least two")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = open_storage(url)
    study = _create_or_load(name, storage, objectives)
    if FINGERPRINT not in study.user_attrs:
        if study.get_trials(deepcopy=False):
            raise InputError("study", name, "was not made by paredown; choose another name with --study")
        if [direction.name.lower() for direction in study.directions] != list(objectives.values()):
            raise InputError("study", name, "has other objectives; choose another name with --study")
        # Also the way of a study whose creator was killed before it came this far.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(objectives))
        study.set_user_attr(FINGERPRINT, dict(fingerprint))
    _refuse_differences(study, fingerprint, objectives, new_reference)
    folder = _artifact_folder(study, url, artifacts)
    return SearchStudy(study, folder, mask_url(url))


def load_study(name: str, *, url: str = DEFAULT_URL) -> SearchStudy:
    """Open an existing study for reading, whatever it was made for.

    Raises:
        InputError: no such database or study; the message lists the studies that are there.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = open_storage(url, create=False)
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        there = sorted(optuna.get_all_study_names(storage))
        raise InputError(
            "study", name, f"not in {mask_url(url)}; there: {', '.join(there) or 'none'}"
        ) from None
    if FINGERPRINT not in study.user_attrs:
        raise InputError("study", name, "was not made by paredown")
    return SearchStudy(study, _artifact_folder(study, url, None), mask_url(url))


def _create_or_load(name: str, storage: RDBStorage, objectives: Mapping[str, Direction]) -> optuna.Study:
    try:
        return optuna.create_study(study_name=name, storage=storage, directions=list(objectives.values()))
    except DuplicatedStudyError:
        return optuna.load_study(study_name=name, storage=storage)


def target_differences(stored: Mapping[str, Any], now: Fingerprint) -> list[str]:
    """Lines of what differs in the target's signature: machine, engine and version, threads."""
    return [line for line in differences_of(stored, now) if line.startswith(SIGNATURE)]


def differences_of(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines of what differs between two fingerprints, before and now; of JSON objects, field by field."""
    lines = []
    for key in sorted({*stored, *now}):
        before, after = stored.get(key), now.get(key)
        if before == after:
            continue
        fields = _object(before), _object(after)
        if all(fields):
            lines += differences_of(
                *({f"{key} {name}": value for name, value in one.items()} for one in fields)
            )
        else:
            lines.append(f"{key}: {before!r} -> {after!r}")
    return lines


def _object(text: Any) -> dict[str, Any]:
    """A JSON object in a text; empty where it is none."""
    try:
        found = json.loads(text) if isinstance(text, str) and text.startswith("{") else None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _refuse_differences(
    study: optuna.Study,
    fingerprint: Fingerprint,
    objectives: Mapping[str, Direction],
    new_reference: bool,
) -> None:
    stored: dict[str, Any] = study.user_attrs[FINGERPRINT]
    differences = differences_of(stored, fingerprint)
    elsewhere = target_differences(stored, fingerprint)
    if new_reference:
        differences = [line for line in differences if line not in elsewhere]
    directions = ["maximize" if d == StudyDirection.MAXIMIZE else "minimize" for d in study.directions]
    before = dict(zip(study.metric_names or [], directions, strict=False))
    if list(before.items()) != list(objectives.items()) or len(directions) != len(objectives):
        differences.append(f"objectives: {before} -> {dict(objectives)}")
    if differences:
        raise InputError(
            "study",
            study.study_name,
            f"was made with other settings ({'; '.join(differences)}); "
            "go back to them, or start another study with --study NEWNAME"
            + (", or go on from a base measured here with --new-reference" * (differences == elsewhere)),
        )


def _artifact_folder(study: optuna.Study, url: str, wanted: Path | None) -> Path:
    """The folder of the model files: as asked for, or as `_found_again`; of a new study one that is not used.

    What another study left there would be taken for this one's: its base, say, once the database is removed.
    """
    stored = _path_of(study.user_attrs.get(ARTIFACT_STORE))
    if wanted is not None:
        if stored is None and _used(wanted):
            raise InputError("artifacts", str(wanted), "holds models of another study; name another folder")
        folder = wanted
    elif stored is None:
        default = _beside(url) / "artifacts" / study.study_name
        others = (default.with_name(f"{default.name}-{k}") for k in itertools.count(2))
        folder = next(place for place in itertools.chain([default], others) if not _used(place))
    else:
        folder = _found_again(stored, url)
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("artifacts", str(folder), f"cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise InputError("artifacts", str(folder), "is not writable")
    if folder != stored:
        study.set_user_attr(ARTIFACT_STORE, folder.as_uri())
    return folder


def _found_again(stored: Path, url: str) -> Path:
    """Where the files of a study are now: as stored, or beside a database that was moved or copied.

    A copied project has copies of the models. To go on in those of the original would remove some there.
    """
    here = _beside(url) / "artifacts" / stored.name
    if not here.is_dir():
        return stored
    if not stored.is_dir():
        return here
    is_copy = _is_beside_another_database(stored, url) and (_used(here) or not _used(stored))
    return here if is_copy else stored


def _is_beside_another_database(stored: Path, url: str) -> bool:
    """True where the database of `url` is a file, and another one lies where `stored` was made for it."""
    database = _database_file(url)
    if database is None or stored.parent.name != "artifacts":
        return False
    there = stored.parents[1]
    return not there.samefile(database.parent) and (there / database.name).is_file()


def _used(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _beside(url: str) -> Path:
    database = _database_file(url)
    return Path("runs") if database is None else database.parent


def _database_file(url: str) -> Path | None:
    """None where the database is a server's."""
    if urlparse(url).scheme.split("+")[0] != "sqlite":
        return None
    return Path(unquote(url.split("///", 1)[1].split("?")[0]))


def _path_of(uri: object) -> Path | None:
    return Path(unquote(urlparse(uri).path)) if isinstance(uri, str) and uri.startswith("file:") else None
