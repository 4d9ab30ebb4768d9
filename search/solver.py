"""Solving for recipes: the least predicted damage for every predicted latency."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluators.latency_model import LatencyModel

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
) -> list[PathPoint]:
    """Recipes from mild to strong, no other one of which is both less damaged and faster by prediction.

    From each start the single change with the most latency saved per damage is made, again and again
    (the greedy solution of the knapsack's Lagrangian). Damage adds up over parameters, latency does not,
    so all single changes are predicted together at each step.

    Args:
        damage: `(P, O)` predicted damage of each option, 0 in column 0, infinite where there is none.
        model: predicts latency ratios.
        starts: where to begin, `(P,)` each: uniform bit-widths, because changing one layer at a time
            pays for casts before it gains.
        slowest_useful: points above this latency ratio are left out.
    """
    points: list[PathPoint] = []
    for start in starts:
        points += _descend(damage, model, start)
    points = [point for point in points if point.latency <= slowest_useful]
    points.sort(key=lambda p: (p.damage, p.latency))
    path: list[PathPoint] = []
    for point in points:
        if not path or point.latency < path[-1].latency - 1e-6:
            path.append(point)
    return path


def _descend(damage: NDArray[np.float64], model: LatencyModel, start: NDArray[np.int64]) -> list[PathPoint]:
    current = start.copy()
    rows = np.arange(len(current))
    latency = float(model.predict(current[None])[0])
    points = [PathPoint(current.copy(), float(damage[rows, current].sum()), latency)]
    changes = [(p, o) for p in rows for o in range(damage.shape[1]) if np.isfinite(damage[p, o])]
    parameter = np.array([p for p, _ in changes])
    option = np.array([o for _, o in changes])
    while True:
        extra = damage[parameter, option] - damage[parameter, current[parameter]]
        possible = (option != current[parameter]) & (extra > -FLOOR)
        if not possible.any():
            return points
        changed, to = parameter[possible], option[possible]
        saved = latency - model.of(model.table.neighbours(current, changed, to))
        worth = np.where(saved > 1e-6, saved / np.maximum(extra[possible], FLOOR), -np.inf)
        best = int(worth.argmax())
        if worth[best] == -np.inf:
            return points
        current = current.copy()
        current[changed[best]] = to[best]
        latency -= float(saved[best])
        points.append(PathPoint(current, float(damage[rows, current].sum()), latency))


def at_damages(path: list[PathPoint], wanted: NDArray[np.float64]) -> list[PathPoint]:
    """The fastest point of the path within each wanted damage; without repeats."""
    chosen: list[PathPoint] = []
    for limit in wanted:
        within = [point for point in path if point.damage <= limit]
        if within and (not chosen or within[-1] is not chosen[-1]):
            chosen.append(within[-1])
    return chosen
