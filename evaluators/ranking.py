"""What is better: objectives and limits by name, dominance, fronts and hypervolume.

The functions on points minimise every coordinate; `Problem.losses` turns what is maximised round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from evaluators.evaluation import Evaluation
from spaces.documents import refused
from spaces.errors import InputError

Direction = Literal["maximize", "minimize"]
Operator = Literal["<=", ">="]
LossesFrom = Literal["trained", "given"]


@dataclass(frozen=True)
class Objective:
    """A metric that can be an objective."""

    name: str
    direction: Direction
    unit: str


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("map", "maximize", "AP"),
        Objective("latency_ms", "minimize", "ms"),
        Objective("latency_ratio", "minimize", "x base"),
        Objective("size_mb", "minimize", "MB"),
        Objective("params", "minimize", "parameters"),
        Objective("macs", "minimize", "MACs"),
        Objective("peak_memory_mb", "minimize", "MB"),
        Objective("train_step_ms", "minimize", "ms"),
    )
}

TRAIN_STEP = "train_step_ms"
MAP_DROP = "map_drop"
"""A limit that is no metric of its own: the base's mAP less the candidate's, AP points."""


class Problem(BaseModel):
    """What a search optimises, and within which limits.

    Limits are `{"latency_ms": ("<=", 8.0), "map_drop": ("<=", 1.0)}`; configurations may write them
    shorter, as `max_latency_ms: 8.0`, `min_map: 30.0`, `max_map_drop: 1.0`. They are kept in the longer
    form, in the order of their names, whatever was given.

    Attributes:
        objectives: names of `OBJECTIVES`.
        limits: bounds by name.
        losses_from: the base that `map_drop` counts from: `trained`, by a candidate's own budget where that
            gains, so that nobody is praised for what mere training gives; or `given`, as it came.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    objectives: tuple[str, ...] = ("map", "latency_ms")
    limits: dict[str, tuple[Operator, float]] = Field(default_factory=dict)
    losses_from: LossesFrom = "trained"

    @field_validator("objectives")
    @classmethod
    def _known_objectives(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in OBJECTIVES:
                raise InputError("objectives", name, f"choose from {', '.join(OBJECTIVES)}")
        if not names or len(set(names)) < len(names):
            raise InputError("objectives", names, "name at least one, and each only once")
        return names

    @field_validator("limits", mode="before")
    @classmethod
    def _long_form(cls, limits: Mapping[str, Any]) -> dict[str, tuple[str, float]]:
        if not isinstance(limits, Mapping):
            raise InputError("limits", limits, "write them as name: bound, such as max_map_drop: 1.0")
        long: dict[str, tuple[str, float]] = {}
        for given, limit in limits.items():
            name, operator, bound = _read_limit(given, limit)
            if name in long:
                raise InputError(f"limits.{given}", limit, f"{name} already has a limit")
            if name == MAP_DROP and operator == "<=" and bound < 0:
                raise InputError(f"limits.{given}", bound, "AP points that may be lost: write 0 or more")
            long[name] = (operator, bound)
        return dict(sorted(long.items()))

    @staticmethod
    def read(data: Mapping[str, Any]) -> Problem:
        """A problem from a configuration's plain data.

        Raises:
            InputError: an unknown or repeated name, or a bound that is no finite number.
        """
        try:
            return Problem.model_validate(data)
        except ValidationError as error:
            raise refused(error, model=Problem) from None

    @property
    def directions(self) -> list[Direction]:
        """As Optuna takes them, one an objective."""
        return [OBJECTIVES[name].direction for name in self.objectives]

    def values(self, evaluation: Evaluation) -> list[float]:
        """The objectives of a successful evaluation, in their own units.

        Raises:
            ValueError: a metric is missing or not finite; such an evaluation has failed.
        """
        return [_metric(evaluation, name) for name in self.objectives]

    def losses(self, values: Sequence[float]) -> list[float]:
        """`values` with the sign changed where more is better: all are then to be minimised."""
        pairs = zip(values, self.directions, strict=True)
        return [-value if direction == "maximize" else value for value, direction in pairs]

    def constraints(self, evaluation: Evaluation, base: Evaluation) -> list[float]:
        """How far each limit is exceeded, in the order of `limits`; <= 0 where it is kept.

        Relative to the bound (absolute for a bound of 0), because samplers add violations up: 0.5 is half
        as much again as allowed. Rounded to 9 digits, so that 31.6 - 30.6 keeps a limit of 1.0.

        Raises:
            ValueError: as in `values`.
        """
        excesses = []
        for name, (operator, bound) in self.limits.items():
            if name == MAP_DROP:
                value = _metric(base, "map") - _metric(evaluation, "map")
            else:
                value = _metric(evaluation, name)
            excess = value - bound if operator == "<=" else bound - value
            excesses.append(round(excess / (abs(bound) or 1.0), 9))
        return excesses

    def allowed_loss(self, base_map: float) -> float:
        """AP points below a base that the limits allow to lose; infinity without such a limit."""
        allowed = [math.inf]
        if MAP_DROP in self.limits and self.limits[MAP_DROP][0] == "<=":
            allowed.append(self.limits[MAP_DROP][1])
        if "map" in self.limits and self.limits["map"][0] == ">=":
            allowed.append(base_map - self.limits["map"][1])
        return min(allowed)

    def feasible(self, evaluation: Evaluation, base: Evaluation) -> bool:
        """Whether every limit is kept."""
        return all(excess <= 0.0 for excess in self.constraints(evaluation, base))


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """True where `a` is nowhere worse than `b` and somewhere better; lower is better."""
    pairs = list(zip(a, b, strict=True))
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


def front(points: ArrayLike) -> list[int]:
    """Indices of the non-dominated points, in ascending order.

    Args:
        points: `(N, M)`, lower is better. Of equal points the first counts; points with NaN never do.
    """
    values = _points(points)
    # In lexicographic order nothing that comes later dominates (or is the first of) what came before.
    order = np.lexsort((np.arange(len(values)), *values.T[::-1]))
    order = order[~np.isnan(values[order]).any(axis=1)]
    if values.shape[1] == 2:  # then the second coordinate alone decides
        second = values[order, 1]
        better = np.append(True, second[1:] < np.minimum.accumulate(second)[:-1])[: len(order)]
        return sorted(int(i) for i in order[better])
    kept: list[int] = []
    for i in order:
        if not (values[kept] <= values[i]).all(axis=1).any():
            kept.append(int(i))
    return sorted(kept)


def non_dominated_ranks(points: ArrayLike) -> NDArray[np.int64]:
    """Rank of each point: 0 on the front, 1 on the front of the rest, and so on.

    Args:
        points: `(N, M)`, lower is better. Equal points share a rank; points with NaN come last.

    Returns:
        `(N,)` int64.
    """
    values = _points(points)
    # [i, j]: point i dominates point j
    dominance = np.all(values[:, None] <= values[None], axis=2)
    dominance &= np.any(values[:, None] < values[None], axis=2)
    ranks = np.full(len(values), -1, dtype=np.int64)
    left = ~np.isnan(values).any(axis=1)
    rank = 0
    while left.any():
        best = left & ~dominance[left].any(axis=0)
        ranks[best] = rank
        left &= ~best
        rank += 1
    ranks[ranks < 0] = rank
    return ranks


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Volume that is dominated by the points and dominates the reference; exact in any dimension.

    Args:
        points: `(N, M)`, lower is better. Points that are not better than the reference in every
            coordinate, or hold NaN, add nothing.
        reference: `(M,)`, the worst corner.

    Two dimensions are one sweep, O(N log N); each further one slices along the last coordinate (HSO: While,
    Hingston, Barone, Huband, "A faster algorithm for calculating hypervolume", IEEE TEC 10(1), 2006),
    which multiplies the time by N.
    """
    corner = np.asarray(reference, dtype=np.float64)
    values = _points(points, len(corner))
    inside = values[(values < corner).all(axis=1)]
    return _volume(inside[front(inside)], corner)


def _volume(points: NDArray[np.float64], corner: NDArray[np.float64]) -> float:
    """Hypervolume of points that are all better than the corner."""
    if len(points) == 0:
        return 0.0
    if points.shape[1] == 1:
        return float(corner[0] - points.min())
    points = points[np.argsort(points[:, -1], kind="stable")]
    if points.shape[1] == 2:
        widths = corner[0] - np.minimum.accumulate(points[:, 0])
        return float(widths @ np.diff(points[:, 1], append=corner[1]))
    depths = np.diff(points[:, -1], append=corner[-1])
    total = 0.0
    for i, depth in enumerate(depths):
        if depth > 0:
            slab = points[: i + 1, :-1]
            total += depth * _volume(slab[front(slab)], corner[:-1])
    return total


def _points(points: ArrayLike, width: int | None = None) -> NDArray[np.float64]:
    values = np.asarray(points, dtype=np.float64)
    if values.size == 0:
        return np.empty((0, width or 1))
    if values.ndim != 2 or (width is not None and values.shape[1] != width):
        raise ValueError(f"points must be (N, {width or 'M'}), not {values.shape}")
    return values


def _metric(evaluation: Evaluation, name: str) -> float:
    measurement = evaluation.metrics.get(name)
    if measurement is None or not math.isfinite(measurement.value):
        found = "is missing" if measurement is None else f"is {measurement.value}"
        raise ValueError(f"{name} of recipe {evaluation.recipe_key} {found}")
    return measurement.value


def _read_limit(given: str, limit: Any) -> tuple[str, Operator, float]:
    field = f"limits.{given}"
    name = str(given)
    implied = {"max_": "<=", "min_": ">="}.get(name[:4])
    if implied is not None:
        name = name[4:]
    if name not in OBJECTIVES and name != MAP_DROP:
        raise InputError(field, limit, f"limit one of {', '.join([*OBJECTIVES, MAP_DROP])}")
    if isinstance(limit, list | tuple) and len(limit) == 2:
        operator, bound = limit
    else:
        operator, bound = implied, limit
    if operator not in ("<=", ">=") or implied not in (None, operator):
        raise InputError(field, limit, f"write max_{name}: bound or min_{name}: bound")
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not math.isfinite(bound):
        raise InputError(field, bound, "the bound must be a finite number")
    return name, "<=" if operator == "<=" else ">=", float(bound)
