"""A surrogate of recorded recipes, so that samplers can be compared in minutes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct, Matern, WhiteKernel
from sklearn.model_selection import KFold

from search.benchmarks.recorded import Recorded
from search.benchmarks.reports import rank_correlation
from spaces.table import Options, SpaceTable

Values = NDArray[np.float64]
Model: TypeAlias = GaussianProcessRegressor | ExtraTreesRegressor
FOLDS = 5
NEAR = 6.0
"""Losses up to so many AP points are those that fronts consist of."""


@dataclass(frozen=True)
class Check:
    """How well a model predicts recipes that it has not seen (5-fold).

    Attributes:
        rank: Spearman's correlation over all recipes.
        error: median absolute error, in the unit of what is predicted.
        near_rank, near_error: the same over the recipes that lose at most `NEAR` AP points.
    """

    rank: float
    error: float
    near_rank: float
    near_error: float


class Surrogate:
    """Loss of mAP and latency ratio of any recipe of the space, learned from the recorded ones.

    Neither model has the form that our sampler assumes (losses that add up over parameters, latencies
    linear in multiplications): the loss is a Gaussian process or a forest over the positions of the
    options, whichever predicts unseen recipes better, of the loss's logarithm, and so is the latency.
    """

    def __init__(self, recorded: Recorded, table: SpaceTable, seed: int = 0) -> None:
        self.table, self.base_map = table, recorded.base_map
        options = recorded.options
        losses = np.maximum(recorded.base_map - np.array(recorded.map), 0.0)
        near = losses <= NEAR
        inputs = self._inputs(options)
        self.kind: dict[str, str] = {}
        self.checks: dict[str, Check] = {}
        self._loss = self._best("loss", inputs, losses, _Logarithm(0.5), near, seed)
        self._ratio = self._best("ratio", inputs, np.array(recorded.ratio), _Logarithm(0.0), near, seed)

    def __call__(self, options: Options) -> tuple[Values, Values]:
        """mAP `(N,)` in 0..100 and latency ratio `(N,)` of recipes `(N, P)`; the base is exact."""
        inputs = self._inputs(options)
        base = ~options.any(axis=1)
        loss, ratio = self._loss(inputs), self._ratio(inputs)
        return self.base_map - np.where(base, 0.0, np.maximum(loss, 0.0)), np.where(base, 1.0, ratio)

    def _inputs(self, options: Options) -> Values:
        """Positions scaled to 0..1, and what they leave of the multiplications at each bit-width."""
        shapes = self.table.shapes(options)
        whole = float(self.table.base.macs.sum())
        widths = [np.where(shapes.bits == b, shapes.macs, 0.0).sum(axis=1) / whole for b in (32, 16, 8)]
        scaled = options / np.maximum(self.table.sizes - 1, 1)
        return np.column_stack([scaled, *widths])

    def _best(
        self, name: str, inputs: Values, values: Values, scale: _Logarithm, near: NDArray[np.bool_], seed: int
    ) -> Callable[[Values], Values]:
        found = {}
        for kind, make in MODELS.items():
            unseen = np.empty(len(values))
            for fit, test in KFold(FOLDS, shuffle=True, random_state=seed).split(inputs):
                model = make(seed).fit(inputs[fit], scale.forth(values[fit]))
                unseen[test] = scale.back(model.predict(inputs[test]))
            found[kind] = Check(
                rank=rank_correlation(values, unseen),
                error=float(np.median(np.abs(values - unseen))),
                near_rank=rank_correlation(values[near], unseen[near]),
                near_error=float(np.median(np.abs(values - unseen)[near])),
            )
        self.kind[name] = max(found, key=lambda kind: found[kind].near_rank)
        self.checks[name] = found[self.kind[name]]
        return _Fitted(MODELS[self.kind[name]](seed).fit(inputs, scale.forth(values)), scale)


@dataclass(frozen=True)
class _Fitted:
    model: Model
    scale: _Logarithm

    def __call__(self, rows: Values) -> Values:
        return self.scale.back(self.model.predict(rows))


@dataclass(frozen=True)
class _Logarithm:
    """Models learn `log(offset + value)`: errors count relative to the value."""

    offset: float

    def forth(self, values: Values) -> Values:
        return np.log(self.offset + values)

    def back(self, values: Values) -> Values:
        result: Values = np.exp(values) - self.offset
        return result


def _gaussian_process(seed: int) -> GaussianProcessRegressor:
    kernel = ConstantKernel() * DotProduct() + ConstantKernel() * Matern(3.0, nu=2.5) + WhiteKernel(0.1)
    return GaussianProcessRegressor(kernel, normalize_y=True, random_state=seed, n_restarts_optimizer=1)


def _forest(seed: int) -> ExtraTreesRegressor:
    return ExtraTreesRegressor(400, min_samples_leaf=2, max_features=0.5, random_state=seed, n_jobs=1)


MODELS: dict[str, Callable[[int], Model]] = {
    "Gaussian process": _gaussian_process,
    "forest": _forest,
}
