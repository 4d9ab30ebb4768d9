"""A model of latency, fitted on measured recipes: good enough to propose candidates, never to rank them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from spaces.table import Options, Shapes, SpaceTable

LANES = 16
"""Channels are computed in blocks of the vector width; a block that is half empty takes as long."""
RIDGE = 1e-3
WIDTHS = (32, 16, 8)


@dataclass(frozen=True)
class LatencyModel:
    """`ratio = features @ weights`, all weights >= 0.

    Attributes:
        table: of the space.
        weights: `(F,)`, in ratio to the base's latency.
        error: median relative error on the recipes of the fit, each left out once.
    """

    table: SpaceTable
    weights: NDArray[np.float64]
    error: float

    def predict(self, options: Options) -> NDArray[np.float64]:
        """Latency ratios `(N,)` to the base."""
        return self.of(self.table.shapes(options))

    def of(self, shapes: Shapes) -> NDArray[np.float64]:
        """Latency ratios `(N,)` of recipes given by their shapes."""
        return features(self.table, shapes) @ self.weights


def features(table: SpaceTable, shapes: Shapes) -> NDArray[np.float64]:
    """Features `(N, F)`, each scaled so that the base's total is about 1.

    For each bit-width: multiplications of dense layers and of depthwise ones in whole vector blocks, and
    elements written; where the space replaces activation functions, elements that a costly one takes as
    well. Then elements that cross from one bit-width to another (casts and Q/DQ), and 1.
    """
    base = table.base
    filled = np.ceil(shapes.outputs / LANES) * LANES / np.maximum(shapes.outputs, 1)
    macs = shapes.macs * filled
    written = shapes.outputs * table.positions
    dense, scale = ~table.depthwise, base.macs.sum()
    elements = float((base.outputs * table.positions).sum())
    thin = max(float(base.macs[:, table.depthwise].sum()), 1e-9)
    columns = []
    for width in WIDTHS:
        here = shapes.bits == width
        columns.append((macs * (here & dense)).sum(1) / scale)
        columns.append((macs * (here & table.depthwise)).sum(1) / thin)
        columns.append((written * here).sum(1) / elements)
        if table.activates:
            columns.append((written * here * shapes.costly).sum(1) / elements)
    before = np.roll(shapes.bits, 1, axis=1)
    before[:, 0] = shapes.bits[:, 0]
    read = shapes.inputs * table.positions
    for narrow in (True, False):
        eight = (shapes.bits == 8) != (before == 8)
        crossing = eight if narrow else (shapes.bits != before) & ~eight
        columns.append((read * crossing).sum(1) / elements)
    columns.append(np.ones(len(shapes.bits)))
    return np.stack(columns, axis=1)


def fit_latency(table: SpaceTable, options: Options, ratios: NDArray[np.float64]) -> LatencyModel:
    """Fit on N measured recipes by non-negative least squares of relative errors, slightly shrunk.

    Args:
        table: of the space.
        options: `(N, P)`.
        ratios: `(N,)` measured latency over the base's.
    """
    matrix = features(table, table.shapes(options))
    weights = _solve(matrix, ratios)
    errors = []
    for k in range(len(ratios)):
        others = np.arange(len(ratios)) != k
        predicted = float(matrix[k] @ _solve(matrix[others], ratios[others]))
        errors.append(abs(predicted / ratios[k] - 1))
    return LatencyModel(table, weights, float(np.median(errors)))


def _solve(matrix: NDArray[np.float64], ratios: NDArray[np.float64]) -> NDArray[np.float64]:
    relative = matrix / ratios[:, None]
    shrink = np.sqrt(RIDGE * len(ratios)) * np.eye(matrix.shape[1])
    rows = np.concatenate([relative, shrink])
    goal = np.concatenate([np.ones(len(ratios)), np.zeros(matrix.shape[1])])
    weights: NDArray[np.float64] = nnls(rows, goal)[0]
    return weights
