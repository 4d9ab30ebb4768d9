"""A model of latency, fitted on measured recipes: good enough to propose candidates, never to rank them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from spaces.table import Options, Shapes, SpaceTable

LANES = 16
"""Channels are computed in blocks of the vector width; a block that is half empty takes as long."""
RIDGE = 1e-3
PAIRED = 10.0
"""Weight of the difference between recipes that are alike but for what follows the network, over that of a
recipe: the model is wrong about both by the same, 10 %, and they are timed to 1 %."""
BOXES = -2
"""Column of the boxes that go into suppression, where the space lowers their number."""
WIDTHS = (32, 16, 8)


@dataclass(frozen=True)
class Reach:
    """The region that the recipes of a fit cover.

    A recipe x lies outside where its leverage x' (X'X)^-1 x is above the largest one of the fit: hidden
    extrapolation (Montgomery, Peck and Vining, Introduction to Linear Regression Analysis, 5th ed., 2012,
    section 3.8). It may be inside the range of each feature and still mix them as nothing did before.

    Attributes:
        inverse: `(F, F)` of X'X, X the features of the fit, slightly shrunk.
        largest: leverage in the fit.
    """

    inverse: NDArray[np.float64]
    largest: float

    @staticmethod
    def of(matrix: NDArray[np.float64]) -> Reach:
        """The reach of features `(N, F)`."""
        gram = matrix.T @ matrix + RIDGE * len(matrix) * np.eye(matrix.shape[1])
        inverse: NDArray[np.float64] = np.linalg.inv(gram).astype(np.float64)
        return Reach(inverse, float(_leverage(matrix, inverse).max()))

    def left_by(self, matrix: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which of the features `(N, F)` lie outside."""
        outside: NDArray[np.bool_] = _leverage(matrix, self.inverse) > self.largest * (1 + 1e-9)
        return outside


def _leverage(matrix: NDArray[np.float64], inverse: NDArray[np.float64]) -> NDArray[np.float64]:
    leverage: NDArray[np.float64] = np.einsum("nf,fg,ng->n", matrix, inverse, matrix)
    return leverage


@dataclass(frozen=True)
class LatencyModel:
    """`ratio = features @ weights`, all weights >= 0.

    Attributes:
        table: of the space.
        weights: `(F,)`, in ratio to the base's latency.
        error: median relative error on the recipes of the fit, each left out once; NaN where it was not
            looked at.
        reach: what `extrapolates` compares with; None where it is not known.
    """

    table: SpaceTable
    weights: NDArray[np.float64]
    error: float
    reach: Reach | None = None

    def predict(self, options: Options) -> NDArray[np.float64]:
        """Latency ratios `(N,)` to the base."""
        return self.of(self.table.shapes(options))

    def of(self, shapes: Shapes) -> NDArray[np.float64]:
        """Latency ratios `(N,)` of recipes given by their shapes."""
        return features(self.table, shapes) @ self.weights

    def extrapolates(self, options: Options) -> NDArray[np.bool_]:
        """`(N,)`, True for recipes unlike all those of the fit: what is predicted there is a guess."""
        matrix = features(self.table, self.table.shapes(options))
        if self.reach is None:
            return np.ones(len(matrix), dtype=bool)
        return self.reach.left_by(matrix)

    def by_layer(
        self, shapes: Shapes, before: NDArray[np.int64], layers: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """What single layers take, in ratio to the base's latency.

        Args:
            shapes: `(K,)` arrays, of one layer each.
            before: `(K,)` bit-widths of the layers executed before them.
            layers: `(K,)`, which ones they are.
        """
        total = np.zeros(len(layers))
        terms = _terms(self.table, shapes, before, layers)
        for weight, term in zip(self.weights[:-1], terms, strict=True):
            total += weight * term
        return total


def features(table: SpaceTable, shapes: Shapes) -> NDArray[np.float64]:
    """Features `(N, F)`, each scaled so that the base's total is about 1.

    For each bit-width: multiplications of dense layers and of depthwise ones in whole vector blocks, and
    elements written, by each factor of a factorised layer; where the space replaces activation functions,
    elements that a costly one takes as well, and those that a polynomial takes; and layers, each of which is
    started. At 8 bits also what dense layers with a kernel gather before they multiply: of few channels and a
    large kernel, as a stem is, it takes longer than the multiplications. Where it may make the input smaller,
    pixels of the input. Then elements that cross from one bit-width to another (casts and Q/DQ); where the
    space lowers the number of proposals, the share of them that is cut out of the pyramid; where it lowers
    that of boxes that go into suppression, their share; and 1.
    """
    before = np.roll(shapes.bits, 1, axis=1)
    before[:, 0] = shapes.bits[:, 0]
    columns = [term.sum(1) for term in _terms(table, shapes, before)]
    return np.stack([*columns, np.ones(len(shapes.bits))], axis=1)


def _terms(
    table: SpaceTable,
    shapes: Shapes,
    before: NDArray[np.int64],
    layers: NDArray[np.int64] | slice = slice(None),
) -> Iterator[NDArray[np.float64]]:
    """What every layer adds to each feature but the last, in their order; arrays like those of `shapes`.

    Args:
        table: of the space.
        shapes: of the layers.
        before: bit-widths of the layers executed before them.
        layers: which ones they are, along the last axis of the shapes.
    """
    base, positions, depthwise = table.base, shapes.positions, table.depthwise[layers]
    thin_parts = table.thin_parts(shapes, layers)
    last = shapes.macs - sum(part.macs for part in thin_parts)
    macs = last * _filled(shapes.outputs) + sum(part.macs * _filled(part.outputs) for part in thin_parts)
    scale, elements = float(base.macs.sum()), float((base.outputs * base.positions).sum())
    thin = max(float(base.macs[:, table.depthwise].sum()), 1e-9)
    macs_dense, macs_thin = macs * ~depthwise / scale, macs * depthwise / thin
    written = shapes.outputs * positions / elements
    costly, approximated = written * shapes.costly, written * shapes.polynomial
    written = written + sum(part.outputs * part.positions for part in thin_parts) / elements
    started = (shapes.outputs > 0) + sum(part.outputs > 0 for part in thin_parts)
    for width in WIDTHS:
        here = shapes.bits == width
        yield macs_dense * here
        yield macs_thin * here
        yield written * here
        if table.activates:
            yield costly * here
        if table.approximates:
            yield approximated * here
        yield started * here / len(table.layers)
    gathers = (table.kernel > 1) & ~table.depthwise
    gathered = max(float((base.inputs * table.kernel * base.positions * gathers).sum()), 1e-9)
    windows = np.where(shapes.rank_in > 0, shapes.rank_in, shapes.inputs) * table.kernel[layers] * positions
    yield windows * gathers[layers] * (shapes.bits == 8) / gathered
    if table.resizes:  # what belongs to no layer also falls with it: counted where the first one runs
        first = np.arange(len(table.layers))[layers] == 0
        yield positions / base.positions[0, layers] * first
    read = shapes.inputs * positions / elements
    eight = (shapes.bits == 8) != (before == 8)
    yield read * eight
    yield read * ((shapes.bits != before) & ~eight)
    if table.proposes:
        yield table.crops[layers] * positions / base.positions[0, layers]
    if table.shortens:
        yield shapes.boxes


def _filled(outputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Channels of whole vector blocks over those that there are."""
    filled: NDArray[np.float64] = np.ceil(outputs / LANES) * LANES / np.maximum(outputs, 1)
    return filled


def fit_latency(table: SpaceTable, options: Options, ratios: NDArray[np.float64]) -> LatencyModel:
    """Fit on N measured recipes by non-negative least squares of relative errors, slightly shrunk.

    What suppression takes of a few per cent would drown in the errors of all else, so it is told by recipes
    that differ in nothing else.

    Args:
        table: of the space.
        options: `(N, P)`.
        ratios: `(N,)` measured latency over the base's.
    """
    matrix = features(table, table.shapes(options))
    weights = _solve(table, matrix, ratios)
    errors = []
    for k in range(len(ratios)):
        others = np.arange(len(ratios)) != k
        predicted = float(matrix[k] @ _solve(table, matrix[others], ratios[others]))
        errors.append(abs(predicted / ratios[k] - 1))
    return LatencyModel(table, weights, float(np.median(errors)), Reach.of(matrix))


def fit_features(table: SpaceTable, matrix: NDArray[np.float64], ratios: NDArray[np.float64]) -> LatencyModel:
    """`fit_latency` for recipes whose features `(N, F)` are known, without looking at its error."""
    return LatencyModel(table, _solve(table, matrix, ratios), float("nan"), Reach.of(matrix))


def _solve(
    table: SpaceTable, matrix: NDArray[np.float64], ratios: NDArray[np.float64]
) -> NDArray[np.float64]:
    relative = matrix / ratios[:, None]
    shrink = np.sqrt(RIDGE * len(ratios)) * np.eye(matrix.shape[1])
    boxes, saved = _alike(matrix, ratios) if table.shortens else (np.empty(0), np.empty(0))
    pairs = np.zeros((len(boxes), matrix.shape[1]))
    pairs[:, BOXES] = PAIRED * boxes
    rows = np.concatenate([relative, shrink, pairs])
    goal = np.concatenate([np.ones(len(ratios)), np.zeros(matrix.shape[1]), PAIRED * saved])
    weights: NDArray[np.float64] = nnls(rows, goal)[0]
    return weights


def _alike(
    matrix: NDArray[np.float64], ratios: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Boxes and ratios of recipes that are alike in all else, each less the mean of those like it."""
    _, group, count = np.unique(
        np.delete(matrix, BOXES, axis=1), axis=0, return_inverse=True, return_counts=True
    )
    group = group.ravel()

    def centred(values: NDArray[np.float64]) -> NDArray[np.float64]:
        means = np.bincount(group, values) / count
        return np.asarray((values - means[group])[count[group] > 1], np.float64)

    return centred(matrix[:, BOXES]), centred(ratios)
