"""Recorded recipes: what was really evaluated in some studies, as a small file that replays need."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from evaluators.bench import Bench
from search.knowledge import finished_trials, measured_damage, probes_of
from search.study import SearchStudy
from spaces.capabilities import Capabilities
from spaces.detectors.base import postprocess_of
from spaces.detectors.registry import make_detector
from spaces.documents import refused
from spaces.errors import InputError
from spaces.sites import find_sites
from spaces.space import MAX_PARAMETERS, Granularity, build_space
from spaces.table import Options, SpaceTable

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
"""A recipe is written as one character a parameter: the position of its value."""


class Recorded(BaseModel):
    """Evaluated recipes of one detector on one target, and what was measured before the first of them.

    Attributes:
        detector, classes, size: for `make_detector`.
        methods, granularity, bit_widths, channel_granule, fuses_elementwise: for `build_space`.
        values: of each parameter, by name: a space that has others now cannot read these recipes.
        conditions: detector, data, target and budget that they were evaluated under.
        base_map: of the base on select, AP in 0..100.
        source: of each recipe, the study that proposed it.
        recipes: one character a parameter.
        map: of each recipe on select, AP in 0..100.
        ratio: of each recipe, latency over the base's.
        damage: `(P, O)` of single options; None where it is infinite.
        probes: recipes of the latency probes; `probe_ratio` their latency ratios.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    detector: str
    classes: int
    size: tuple[int, int]
    methods: tuple[str, ...]
    granularity: Granularity
    bit_widths: tuple[int, ...]
    channel_granule: int
    values: dict[str, tuple[float | str, ...]]
    conditions: dict[str, Any]
    base_map: float
    source: tuple[str, ...]
    recipes: tuple[str, ...]
    map: tuple[float, ...]
    ratio: tuple[float, ...]
    damage: tuple[tuple[float | None, ...], ...]
    probes: tuple[str, ...]
    probe_ratio: tuple[float, ...]
    fuses_elementwise: bool = False

    def write(self, file: Path) -> None:
        """As JSON, a list a line, so that versions can be compared."""
        content = self.model_dump(mode="json")
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()]
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n")

    def table(self) -> SpaceTable:
        """The space that the recipes are of, made anew.

        Raises:
            InputError: this version makes another space for the detector.
        """
        detector = make_detector(self.detector, self.classes, self.size)
        resized = partial(make_detector, self.detector, self.classes) if "resize" in self.methods else None
        topk = postprocess_of(detector).pre_nms_topk if "topk" in self.methods else None
        sites = find_sites(detector, detector.build(), MAX_PARAMETERS, resized, topk)
        fuses = self.fuses_elementwise
        capabilities = Capabilities(self.bit_widths, self.channel_granule, fuses_elementwise=fuses)
        space = build_space(detector, sites, capabilities, self.methods, self.granularity)
        if {name: p.values for name, p in space.parameters.items()} != self.values:
            raise InputError("recipes", self.detector, "were recorded in another space; record them anew")
        return SpaceTable(space)

    @property
    def options(self) -> Options:
        """`(N, P)` of the recipes."""
        return decoded(self.recipes)

    @property
    def damages(self) -> NDArray[np.float64]:
        """`(P, O)`."""
        return np.array([[np.inf if d is None else d for d in row] for row in self.damage])


def read_recorded(file: Path) -> Recorded:
    """Read what `Recorded.write` wrote.

    Raises:
        InputError: no such file, or another content.
    """
    try:
        return Recorded.model_validate_json(file.read_text())
    except OSError as error:
        raise InputError("recipes", str(file), f"cannot be read ({error.strerror})") from None
    except ValidationError as error:
        raise refused(error, str(file)) from None


def gathered(bench: Bench, studies: Sequence[SearchStudy], earlier: Recorded | None = None) -> Recorded:
    """All recipes that the studies evaluated, each once; sensitivities and probes of the first that has them.

    Args:
        bench: of the studies.
        studies: of one problem.
        earlier: recipes that count, too: their studies may be gone.

    Raises:
        InputError: a study or the earlier recipes were made under other conditions than the first study, or
            none has sensitivities.
    """
    require_one_problem(studies)
    table, first = SpaceTable(bench.space), studies[0]
    rows: dict[str, tuple[str, float, float]] = {}
    if earlier is not None:
        _refuse_other("--add", earlier.detector, earlier.conditions, first.name, first.fingerprint)
        known_rows = zip(earlier.source, earlier.map, earlier.ratio, strict=True)
        rows.update(zip(earlier.recipes, known_rows, strict=True))
    for study in studies:
        found = finished_trials(table, study.optuna.get_trials(deepcopy=False))
        for code, ap, ratio in zip(encoded(found.options), found.map, found.ratio, strict=True):
            rows.setdefault(code, (study.name, float(ap), float(ratio)))
    known = ((study, measured_damage(table, study)) for study in studies)
    prepared, damage = next((pair for pair in known if pair[1] is not None), (first, None))
    base = encoded(np.zeros((1, len(table.names)), np.int64))[0]
    if damage is None or base not in rows:
        raise InputError("study", first.name, "none of the studies has a base and sensitivities")
    probes, probe_ratios = probes_of(table, prepared)
    config, capabilities = bench.config, bench.capabilities
    return Recorded(
        detector=config.model,
        classes=len(bench.categories),
        size=bench.detector.preprocess.size,
        methods=config.space.methods,
        granularity=config.space.granularity,
        bit_widths=capabilities.bit_widths,
        channel_granule=capabilities.channel_granule,
        fuses_elementwise=capabilities.fuses_elementwise,
        values={name: p.values for name, p in bench.space.parameters.items()},
        conditions=first.fingerprint,
        base_map=rows[base][1],
        source=tuple(source for source, _, _ in rows.values()),
        recipes=tuple(rows),
        map=tuple(round(ap, 3) for _, ap, _ in rows.values()),
        ratio=tuple(round(ratio, 5) for _, _, ratio in rows.values()),
        damage=tuple(tuple(round(d, 6) if np.isfinite(d) else None for d in row) for row in damage.tolist()),
        probes=tuple(encoded(probes)),
        probe_ratio=tuple(round(float(ratio), 5) for ratio in probe_ratios),
    )


def require_one_problem(studies: Sequence[SearchStudy]) -> None:
    """Raises InputError where a study was made under other conditions than the first."""
    first = studies[0]
    for study in studies[1:]:
        _refuse_other("study", study.name, study.fingerprint, first.name, first.fingerprint)


def require_its_problem(study: SearchStudy, recorded: Recorded) -> None:
    """Raises InputError where a study is of other conditions than the recorded recipes."""
    _refuse_other("study", study.name, study.fingerprint, "the recipes", recorded.conditions)


def _refuse_other(
    field: str, value: str, theirs: Mapping[str, Any], named: str, wanted: Mapping[str, Any]
) -> None:
    different = sorted(key for key, said in wanted.items() if theirs.get(key) != said)
    if different:
        raise InputError(field, value, f"differs from {named} in {', '.join(different)}")


def encoded(options: Options) -> list[str]:
    """Recipes `(N, P)` as strings."""
    return ["".join(DIGITS[int(o)] for o in row) for row in options]


def decoded(codes: Sequence[str]) -> Options:
    """The inverse of `encoded`."""
    return np.array([[DIGITS.index(c) for c in code] for code in codes], dtype=np.int64)
