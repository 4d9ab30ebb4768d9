"""Solving for recipes: the least predicted damage for every predicted latency."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from evaluators.latency_model import LatencyModel
from spaces.table import SpaceTable

FLOOR = 1e-9


@dataclass(frozen=True)
class PathPoint:
    """A recipe on the way from mild to strong compression."""

    options: NDArray[np.int64]
    damage: float
    latency: float


def damage_path(
    damage: NDArray[np.float64],
    model: LatencyModel,
    starts: list[NDArray[np.int64]],
    slowest_useful: float = 0.999,
    limit: float = np.inf,
) -> list[PathPoint]:
    """Recipes from mild to strong, no other one of which is both less damaged and faster by prediction.

    From each start the single change with the most latency saved per damage is made, again and again
    (the greedy solution of the knapsack's Lagrangian). Damage adds up over parameters, latency does not,
    so what a change saves is predicted anew whenever a change beside it was made.

    Args:
        damage: `(P, O)` predicted damage of each option, 0 in column 0, infinite where there is none.
        model: predicts latency ratios.
        starts: where to begin, `(P,)` each: uniform bit-widths, because changing one layer at a time
            pays for casts before it gains.
        slowest_useful: points above this latency ratio are left out.
        limit: of the damage. Points beyond it are left out, except the mildest one where no other is left.
    """
    changes = _Changes(damage, model.table)
    points: list[PathPoint] = []
    for start in starts:
        for point in _Descent(damage, model, start, changes):
            if point.latency <= slowest_useful:
                points.append(point)
                if point.damage > limit:
                    break
    points.sort(key=lambda p: (p.damage, p.latency))
    path: list[PathPoint] = []
    for point in points:
        if path and point.damage > limit:
            break
        if not path or point.latency < path[-1].latency - 1e-6:
            path.append(point)
    return path


class _Changes:
    """All single changes that a space allows, where they act, and which of them depend on each other.

    What a change saves is the sum over the layers that it acts on: those whose shape some option of its
    parameter changes, and the ones executed right behind them, which may read through a cast.

    Attributes:
        parameter, option: `(M,)` what each change sets, and to which position.
        pairs: `(E,)` changes, once for each layer that they act on; in ascending order.
        layers: `(E,)` these layers.
        whole: `(M,)` True where no layer shows what the change does, so the whole recipe is predicted.
        beside: `(P, M)` True where what a change saves may depend on a parameter.
    """

    def __init__(self, damage: NDArray[np.float64], table: SpaceTable) -> None:
        self.parameter, self.option = np.nonzero(np.isfinite(damage))
        base = np.zeros(len(damage), np.int64)
        changed = table.neighbours(base, self.parameter, self.option)
        different = np.zeros((len(self.parameter), len(table.layers)), bool)
        for field in fields(changed):
            different |= getattr(changed, field.name) != getattr(table.base, field.name)
        touched = np.zeros((len(damage), len(table.layers)), bool)
        np.logical_or.at(touched, self.parameter, different)
        acts = touched.copy()
        acts[:, 1:] |= touched[:, :-1]
        self.pairs, self.layers = np.nonzero(acts[self.parameter])
        elsewhere: NDArray[np.bool_] = np.logical_not(touched.any(axis=1))
        self.whole = elsewhere[self.parameter]
        near = acts.copy()
        near[:, :-1] |= acts[:, 1:]
        common: NDArray[np.bool_] = np.matmul(touched, near.T)
        self.beside = common[:, self.parameter]
        self.beside[elsewhere] = True
        self.beside |= self.whole


class _Descent:
    """The recipes from a start on, step by step made faster by the best single change."""

    def __init__(
        self, damage: NDArray[np.float64], model: LatencyModel, start: NDArray[np.int64], changes: _Changes
    ) -> None:
        self._damage, self._model, self._changes, self._start = damage, model, changes, start

    def __iter__(self) -> Iterator[PathPoint]:
        damage, changes, current = self._damage, self._changes, self._start
        parameter, option, price = changes.parameter, changes.option, damage[np.isfinite(damage)]
        latency = float(self._model.predict(current[None])[0])
        saved = np.zeros(len(parameter))
        again = np.ones(len(parameter), bool)
        rows = np.arange(len(damage))
        while True:
            yield PathPoint(current, float(damage[rows, current].sum()), latency)
            saved[again] = self._saved(current, latency, again)
            extra = price - damage[parameter, current[parameter]]
            possible = (option != current[parameter]) & (extra > -FLOOR) & (saved > 1e-6)
            if not possible.any():
                return
            best = int(np.where(possible, saved / np.maximum(extra, FLOOR), -np.inf).argmax())
            latency -= float(saved[best])
            current = current.copy()
            current[parameter[best]] = option[best]
            again = changes.beside[parameter[best]]

    def _saved(
        self, current: NDArray[np.int64], latency: float, which: NDArray[np.bool_]
    ) -> NDArray[np.float64]:
        """Latency ratio that each of the changes `which` `(M,)` saves."""
        changes, model, table = self._changes, self._model, self._model.table
        held, pair = table.held(current), which[changes.pairs]
        change, layer = changes.pairs[pair], changes.layers[pair]
        # One call for what the layers take now and what they would take.
        parameter, layers = np.tile(changes.parameter[change], 2), np.tile(layer, 2)
        option = np.concatenate([current[parameter[: len(change)]], changes.option[change]])
        before = table.bits_after(held, parameter, option, np.maximum(layers - 1, 0))
        taken = model.by_layer(table.neighbours(held, parameter, option, layers), before, layers)
        less = taken[: len(change)] - taken[len(change) :]
        saved = np.zeros(len(which))
        np.add.at(saved, change, less)
        whole = which & changes.whole
        if whole.any():
            shapes = table.neighbours(held, changes.parameter[whole], changes.option[whole])
            saved[whole] = latency - model.of(shapes)
        return saved[which]


def at_damages(path: list[PathPoint], wanted: NDArray[np.float64]) -> list[PathPoint]:
    """The fastest point of the path within each wanted damage; without repeats."""
    chosen: list[PathPoint] = []
    for limit in wanted:
        within = [point for point in path if point.damage <= limit]
        if within and (not chosen or within[-1] is not chosen[-1]):
            chosen.append(within[-1])
    return chosen
