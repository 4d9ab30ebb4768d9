"""A surrogate of recorded recipes, so that samplers can be compared in minutes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
MEAN = "mean of both"
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

    It does not have the form that our sampler assumes (losses that add up over parameters, latencies linear
    in multiplications): the logarithms of both are means of a Gaussian process and a forest over the
    positions of the options. A forest alone is flat between the recipes it knows, which hides what small
    steps gain; a process alone is less exact.
    """

    def __init__(self, recorded: Recorded, table: SpaceTable, seed: int = 0) -> None:
        self.table, self.base_map = table, recorded.base_map
        options = recorded.options
        losses = np.maximum(recorded.base_map - np.array(recorded.map), 0.0)
        near = losses <= NEAR
        inputs = self._inputs(options)
        self.checks: dict[str, dict[str, Check]] = {}
        self._loss = self._fitted("loss", inputs, losses, _Logarithm(0.5), near, seed)
        self._ratio = self._fitted("ratio", inputs, np.array(recorded.ratio), _Logarithm(0.0), near, seed)

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

    def _fitted(
        self, name: str, inputs: Values, values: Values, scale: _Logarithm, near: NDArray[np.bool_], seed: int
    ) -> _Mean:
        """The model of all recipes, with checks of it and of its parts on recipes that they have not seen."""
        unseen: dict[str, Values] = {kind: np.empty(len(values)) for kind in MODELS}
        for fit, test in KFold(FOLDS, shuffle=True, random_state=seed).split(inputs):
            for kind, make in MODELS.items():
                unseen[kind][test] = (
                    make(seed).fit(inputs[fit], scale.forth(values[fit])).predict(inputs[test])
                )
        unseen = {MEAN: np.mean(list(unseen.values()), axis=0), **unseen}
        self.checks[name] = {kind: _check(values, scale.back(found), near) for kind, found in unseen.items()}
        models = [make(seed).fit(inputs, scale.forth(values)) for make in MODELS.values()]
        return _Mean(models, scale)


def _check(values: Values, predicted: Values, near: NDArray[np.bool_]) -> Check:
    errors = np.abs(values - predicted)
    return Check(
        rank=rank_correlation(values, predicted),
        error=float(np.median(errors)),
        near_rank=rank_correlation(values[near], predicted[near]),
        near_error=float(np.median(errors[near])),
    )


@dataclass(frozen=True)
class _Mean:
    models: Sequence[Model]
    scale: _Logarithm

    def __call__(self, rows: Values) -> Values:
        return self.scale.back(np.mean([model.predict(rows) for model in self.models], axis=0))


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
