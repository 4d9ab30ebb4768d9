"""What the study knows for proposing: damage of options, latency of recipes, and what trials led to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial

from evaluators.latency_model import LatencyModel, features, fit_features
from search.sensitivity import JOB, Sensitivity, damage_table
from search.study import SearchStudy
from search.trials import evaluation_of, is_candidate
from spaces.recipe import Recipe
from spaces.table import Options, SpaceTable

PROBE = "probe"
WARM = "warm start"
"""Study attribute: what `search.warm_start` took from another study."""


class Positions(Protocol):
    """Names of parameters and the positions of their values: a `SpaceTable`, or a stored `Sensitivity`."""

    @property
    def names(self) -> list[str]:
        """P parameters."""
        ...

    def options(self, params: Sequence[Mapping[str, Any]]) -> Options:
        """Positions `(N, P)` of the values of N sets of parameters."""
        ...


@dataclass(frozen=True)
class Finished:
    """Evaluated trials: positions `(N, P)`, mAP `(N,)` in 0..100 and latency ratios `(N,)`."""

    options: Options
    map: NDArray[np.float64]
    ratio: NDArray[np.float64]


def figures_of(trial: FrozenTrial) -> tuple[float, float] | None:
    """mAP and latency ratio of an evaluated trial; None for copies and for what is not evaluated."""
    evaluation = evaluation_of(trial) if is_candidate(trial) else None
    if evaluation is None or not {"map", "latency_ratio"} <= evaluation.metrics.keys():
        return None
    return evaluation.metrics["map"].value, evaluation.metrics["latency_ratio"].value


def finished_trials(table: Positions, trials: list[FrozenTrial]) -> Finished:
    """The evaluated trials of this space, the base among them."""
    rows, figures = [], []
    for trial in trials:
        found = figures_of(trial) if set(trial.params) == set(table.names) else None
        if found is not None:
            rows.append(trial.params)
            figures.append(found)
    values = np.array(figures, float).reshape(-1, 2)
    return Finished(table.options(rows), values[:, 0], values[:, 1])


class LatencyLearner:
    """Fits the latency model to probes and finished trials, again and again.

    Features of recipes are computed once and kept, which saves time and nothing else.

    Args:
        table: of the space.
        probes: `(K, P)`, recipes that were only timed.
        ratios: `(K,)`, their latency over the base's.
    """

    def __init__(self, table: SpaceTable, probes: Options, ratios: NDArray[np.float64]) -> None:
        self._table, self._probes, self._ratios = table, probes, ratios
        self._features: dict[bytes, NDArray[np.float64]] = {}

    @property
    def probed(self) -> int:
        """How many recipes were only timed."""
        return len(self._ratios)

    def __call__(self, finished: Finished) -> LatencyModel:
        """The model of the probes and these trials; one of the two must not be empty."""
        options = np.concatenate([self._probes, finished.options])
        keys = [row.tobytes() for row in options]
        new = {key: k for k, key in enumerate(keys) if key not in self._features}
        if new:
            rows = features(self._table, self._table.shapes(options[list(new.values())]))
            self._features.update(zip(new, rows, strict=True))
        matrix = np.array([self._features[key] for key in keys])
        return fit_features(self._table, matrix, np.concatenate([self._ratios, finished.ratio]))


def probes_of(table: SpaceTable, study: SearchStudy) -> tuple[Options, NDArray[np.float64]]:
    """Recipes `(K, P)` that the study only timed, and their latency ratios `(K,)`."""
    recipes, ratios = [], []
    for name, result in study.job_results().items():
        if name.startswith(PROBE) and "ratio" in result:
            recipes.append(table.space.params(Recipe.from_json(result["recipe"])))
            ratios.append(float(result["ratio"]))
    return table.options(recipes), np.array(ratios, float)


def latency_learner(table: SpaceTable, study: SearchStudy) -> LatencyLearner:
    """A learner with the study's probes."""
    return LatencyLearner(table, *probes_of(table, study))


def measured_damage(table: SpaceTable, study: SearchStudy) -> NDArray[np.float64] | None:
    """Damage `(P, O)` of single options; None where sensitivities were not measured.

    In a study that began with another one, a unit of damage counts by what it cost there after training,
    and options whose own damage could not be measured have that of the other study.
    """
    results = [r for name, r in study.job_results().items() if name.startswith(JOB) and "damage" in r]
    if not results:
        return None
    damage = damage_table(table, results)
    warm = study.optuna.user_attrs.get(WARM)
    if not warm:
        return damage
    weights = np.array([warm["weights"].get(name, 1.0) for name in table.names])
    weighted: NDArray[np.float64] = damage * weights[:, None]
    known = Sensitivity.from_json(warm["damage"])
    for p, (name, parameter) in enumerate(table.space.parameters.items()):
        if name in known.names and not np.isfinite(damage[p, 1:]).any():
            row = known.names.index(name)
            for o, value in enumerate(parameter.values):
                if value in known.values[row]:
                    theirs = known.damage[row, known.values[row].index(value)]
                    weighted[p, o] = theirs * (weights[p] if o else 1.0)
    return weighted
