"""What single choices cost in mAP: damage measured without training, corrected by what the trials lost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import nnls

from search.knowledge import Finished, Positions
from spaces.space import LABELS
from spaces.table import Options

ROUNDS = 3
MOST_TRIALS = 500
"""In a fit: those that say most, so that thousands of trials take no longer."""
LEAST_LOSS = 0.05
"""AP points; a trial that lost less, or gained, counts as one that lost this."""
LEAST_KIND = 0.3
"""Weight of a kind of choice over that of all: trials may show that its small damages are repaired, and yet
a large one of them may not be."""
SHARED, OWN = 3.0, 6.0
"""Standard deviations of the factor of a parameter and of an option, before trials are seen."""
UNSEEN_LOSS = 0.03
"""AP points that the damage of an option may have missed, of one standard deviation of `OWN`."""
FACTORS = (0.1, 10.0)
"""How far an option's loss may leave what its damage says."""


@dataclass(frozen=True)
class LossModel:
    """Predicted losses of mAP, which add up over parameters.

    Attributes:
        damage: `(P, O)` measured without training; infinite where an option is not there.
        loss: `(P, O)` AP points of each option; as infinite.
    """

    damage: NDArray[np.float64]
    loss: NDArray[np.float64]

    @property
    def weights(self) -> NDArray[np.float64]:
        """AP points `(P,)` for one unit of a parameter's damage, by least squares over its options."""
        there = np.isfinite(self.damage)
        damage, loss = np.where(there, self.damage, 0.0), np.where(there, self.loss, 0.0)
        squares = (damage**2).sum(axis=1)
        weights: NDArray[np.float64] = np.where(
            squares > 0, (damage * loss).sum(axis=1) / np.where(squares > 0, squares, 1.0), 1.0
        )
        return weights

    def each(self, options: Options) -> NDArray[np.float64]:
        """Loss `(N, P)` of every choice of recipes `(N, P)`; options that are not there count nothing."""
        single = self.loss[np.arange(len(self.loss)), options]
        counted: NDArray[np.float64] = np.where(np.isfinite(single), single, 0.0)
        return counted

    def of(self, options: Options) -> NDArray[np.float64]:
        """Loss `(N,)` of recipes `(N, P)`."""
        total: NDArray[np.float64] = self.each(options).sum(axis=1)
        return total


def fit_loss(
    table: Positions,
    damage: NDArray[np.float64],
    finished: Finished,
    base_map: float,
    trust: NDArray[np.float64] | None = None,
) -> LossModel:
    """Fit the losses of options to what trials lost, each of which counts by its `trust` `(N,)` in 0..1.

    Fine-tuning repairs some damage and not other: pruning more than rounding, late layers more than early
    ones, a small damage wholly and a large one of the same kind hardly. So each kind of choice has a weight,
    each parameter a factor to it, and each option a deviation of its own; factors and deviations are 0 unless
    the trials say otherwise (Bayesian linear regression, Bishop 2006, section 3.3, with the kinds' weights as
    the mean). Errors count relative to the geometric mean of measured and predicted loss: relative to the
    measured one alone, a fit that predicts too little would look good, and the solver would walk into every
    option that it underrates. Before anything was measured one unit of damage costs one AP point, which only
    orders the options.

    Args:
        table: of the space.
        damage: `(P, O)` of single options.
        finished: evaluated trials; those of the base teach nothing.
        base_map: AP in 0..100 that losses count from.
        trust: of each trial; 1 where it is not given.
    """
    changed = finished.options.any(axis=1)
    if not changed.any():
        return LossModel(damage, damage)
    options = finished.options[changed]
    losses = np.maximum(base_map - finished.map[changed], LEAST_LOSS)
    trusted = np.ones(len(losses)) if trust is None else np.sqrt(trust[changed])
    known = np.where(np.isfinite(damage), damage, 0.0)
    fit = _Fit(_kinds(table), known, options, losses)
    predicted = losses
    for _ in range(ROUNDS):  # the errors' scale depends on the prediction
        loss = fit.losses((0.5 + np.sqrt(losses * predicted)) / trusted)
        predicted = LossModel(known, loss).of(options)
    return LossModel(damage, np.where(np.isfinite(damage), loss, np.inf))


class _Fit:
    """Losses of options for given errors of the trials.

    Args:
        kinds: `(P,)` of the parameters.
        damage: `(P, O)`, 0 where there is no option.
        options, losses: `(N, P)` and `(N,)` of the trials.
    """

    def __init__(
        self,
        kinds: NDArray[np.int64],
        damage: NDArray[np.float64],
        options: Options,
        losses: NDArray[np.float64],
    ) -> None:
        self._kinds, self._damage, self._options, self._losses = kinds, damage, options, losses
        self._rows = np.arange(len(kinds))
        single = damage[self._rows, options]
        every = range(int(kinds.max()) + 1)
        self._by_kind = np.stack([(single * (kinds == k)).sum(axis=1) for k in every], axis=1)
        chosen = options[:, :, None] == np.arange(damage.shape[1])
        chosen[:, :, 0] = False
        self._tried = np.flatnonzero(chosen.any(axis=0))
        self._chosen = chosen.reshape(len(options), -1)[:, self._tried]

    def losses(self, errors: NDArray[np.float64]) -> NDArray[np.float64]:
        """`(P, O)`, from trials with these standard errors `(N,)`, AP points."""
        mean = self._damage * self._kind_weights(1 / errors)[self._kinds][:, None]
        used = np.argsort(errors, kind="stable")[:MOST_TRIALS]
        single = mean[self._rows, self._options[used]]
        spread = OWN * (mean + UNSEEN_LOSS)
        own = self._chosen[used] * spread.flat[self._tried]
        shared = SHARED * single
        covariance = shared @ shared.T + own @ own.T + np.diag(errors[used] ** 2)
        told = cho_solve(cho_factor(covariance), self._losses[used] - single.sum(axis=1))
        factor = SHARED * (shared.T @ told)
        deviation = np.zeros_like(mean)
        deviation.flat[self._tried] = spread.flat[self._tried] * (own.T @ told)
        low, high = FACTORS
        found: NDArray[np.float64] = np.clip(
            mean * (1 + factor[:, None]) + deviation, low * mean, high * (mean + UNSEEN_LOSS)
        )
        found[:, 0] = 0.0
        return found

    def _kind_weights(self, scale: NDArray[np.float64]) -> NDArray[np.float64]:
        """A weight `(K,)` for each kind of choice, shrunk towards one for all."""
        sums, losses = self._by_kind, self._losses
        count = sums.shape[1]
        total = sums.sum(axis=1)
        told = total > 0.0  # choices that cost nothing, such as fewer boxes in suppression, tell nothing
        overall = float(np.median(losses[told] / total[told])) if told.any() else 1.0
        shrink = 0.1 * np.eye(count) * max(float(sums.mean()), 1e-6)
        matrix = np.concatenate([sums * scale[:, None], shrink])
        goal = np.concatenate([losses * scale, shrink @ np.full(count, overall)])
        weights: NDArray[np.float64] = np.maximum(nnls(matrix, goal)[0], LEAST_KIND * overall)
        return weights


def _kinds(table: Positions) -> NDArray[np.int64]:
    labels = list(LABELS.values())
    return np.array([labels.index(name.split(" ", 1)[0]) for name in table.names])
