"""What the study knows for proposing: damage of options, latency of recipes, and the mAP they led to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial
from scipy.optimize import nnls

from evaluators.latency_model import LatencyModel, features, fit_features
from search.sensitivity import JOB, Sensitivity, damage_table
from search.study import SearchStudy
from search.trials import evaluation_of, is_candidate
from spaces.recipe import Recipe
from spaces.space import LABELS
from spaces.table import Options, SpaceTable

PROBE = "probe"
WARM = "warm start"
"""Study attribute: what `search.warm_start` took from another study."""
ROUNDS = 5
FACTOR_RIDGE = 0.1
FACTORS = (0.1, 10.0)
"""How far a parameter's weight may leave that of its kind."""


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


@dataclass(frozen=True)
class LossModel:
    """Predicted loss of mAP: the damage of each option times a weight of its parameter.

    Attributes:
        damage: `(P, O)`.
        weights: `(P,)` AP points for one unit of damage.
    """

    damage: NDArray[np.float64]
    weights: NDArray[np.float64]

    @property
    def loss(self) -> NDArray[np.float64]:
        """Predicted loss `(P, O)` of each option, AP points."""
        scaled: NDArray[np.float64] = self.damage * self.weights[:, None]
        return scaled


def fit_loss(
    table: Positions,
    damage: NDArray[np.float64],
    finished: Finished,
    base_map: float,
    trust: NDArray[np.float64] | None = None,
) -> LossModel:
    """Fit the weights to measured losses of mAP, each of which counts by its `trust` `(N,)` in 0..1.

    Fine-tuning repairs some damage and not other: pruning more than rounding, late layers more than early
    ones. So each kind of choice has a weight, and each parameter a factor to it that is 1 unless the
    trials say otherwise (ridge regression towards 1). Errors count relative to the geometric mean of
    measured and predicted loss: relative to the measured one alone, a fit that predicts too little would
    look good, and the solver would walk into every option that it underrates. Before anything was
    measured one unit of damage costs one AP point, which only orders the options.
    """
    labels = list(LABELS.values())
    kinds = np.array([labels.index(name.split(" ", 1)[0]) for name in table.names])
    changed = finished.options.any(axis=1)
    weights = np.ones(len(kinds))
    if not changed.any():
        return LossModel(damage, weights)
    options = finished.options[changed]
    losses = np.maximum(base_map - finished.map[changed], 0.05)
    single = damage[np.arange(len(kinds)), options]
    single = np.where(np.isfinite(single), single, 0.0)
    predicted, trusted = losses, np.ones(len(losses)) if trust is None else np.sqrt(trust[changed])
    for _ in range(ROUNDS):  # the errors' scale depends on the prediction
        scale = trusted / (0.5 + np.sqrt(losses * predicted))
        by_kind = _kind_weights(single, kinds, len(labels), losses, scale)[kinds]
        matrix = single * by_kind * scale[:, None]
        gram = matrix.T @ matrix + FACTOR_RIDGE * np.eye(len(kinds))
        factors = np.linalg.solve(gram, matrix.T @ (losses * scale) + FACTOR_RIDGE)
        weights = by_kind * np.clip(factors, *FACTORS)
        predicted = single @ weights
    return LossModel(damage, weights)


def _kind_weights(
    single: NDArray[np.float64],
    kinds: NDArray[np.int64],
    count: int,
    losses: NDArray[np.float64],
    scale: NDArray[np.float64],
) -> NDArray[np.float64]:
    """A weight `(K,)` for each kind of choice, shrunk towards one for all."""
    sums = np.stack([(single * (kinds == k)).sum(axis=1) for k in range(count)], axis=1)
    overall = float(np.median(losses / np.maximum(sums.sum(axis=1), 1e-9)))
    shrink = 0.1 * np.eye(count) * max(float(sums.mean()), 1e-6)
    matrix = np.concatenate([sums * scale[:, None], shrink])
    goal = np.concatenate([losses * scale, shrink @ np.full(count, overall)])
    weights: NDArray[np.float64] = np.maximum(nnls(matrix, goal)[0], 1e-3)
    return weights
