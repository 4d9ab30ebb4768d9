from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from evaluators.evaluation import Evaluation, Failure, Measurement
from evaluators.ranking import (
    OBJECTIVES,
    Problem,
    dominates,
    front,
    hypervolume,
    non_dominated_ranks,
)
from spaces.errors import InputError


def evaluated(**metrics: float) -> Evaluation:
    return Evaluation(
        recipe_key="abc",
        status="ok",
        metrics={name: Measurement(value=value, unit="") for name, value in metrics.items()},
    )


BASE = evaluated(map=31.6, latency_ms=10.0, params=900_000)


def test_values_and_directions() -> None:
    problem = Problem()
    assert problem.objectives == ("map", "latency_ms")
    assert problem.directions == ["maximize", "minimize"]
    values = problem.values(evaluated(latency_ms=7.5, map=30.0, size_mb=3.0))
    assert values == [30.0, 7.5]
    assert problem.losses(values) == [-30.0, 7.5]
    assert [OBJECTIVES[name].direction for name in OBJECTIVES].count("maximize") == 1


def test_a_failed_evaluation_has_no_values() -> None:
    failed = Evaluation(recipe_key="abc", status="failed", failure=Failure(stage="export", reason="no"))
    with pytest.raises(ValueError, match="map of recipe abc is missing"):
        Problem().values(failed)
    with pytest.raises(ValueError, match="latency_ms of recipe abc is nan"):
        Problem().values(evaluated(map=30.0, latency_ms=float("nan")))


def test_constraints_are_relative_excesses() -> None:
    problem = Problem.read({"limits": {"max_map_drop": 2.0, "latency_ms": ("<=", 8.0), "min_params": 1000}})
    assert list(problem.limits) == ["latency_ms", "map_drop", "params"]
    candidate = evaluated(map=28.6, latency_ms=6.0, params=500)
    # 6 / 8 is 2 / 8 below; 3 AP lost of 2 allowed; half of the parameters missing.
    assert problem.constraints(candidate, BASE) == [-0.25, 0.5, 0.5]
    assert not problem.feasible(candidate, BASE)
    assert problem.feasible(evaluated(map=33.0, latency_ms=8.0, params=1000), BASE)
    assert Problem.read({"limits": {"max_map_drop": 0.0}}).constraints(evaluated(map=31.0), BASE) == [0.6]
    assert Problem().constraints(candidate, BASE) == []


def test_rounding_keeps_a_limit_that_is_met_exactly() -> None:
    base = evaluated(map=56.9)
    assert 56.9 - 55.9 > 1.0 - 1e-12
    assert Problem.read({"limits": {"max_map_drop": 1.0}}).feasible(evaluated(map=55.9), base)
    assert not Problem.read({"limits": {"max_map_drop": 1.0}}).feasible(evaluated(map=55.8999), base)


def test_both_ways_to_write_a_limit_agree() -> None:
    short = Problem.read({"limits": {"max_latency_ms": 8, "max_map_drop": 1.0, "min_map": 20}})
    long = Problem(limits={"map": (">=", 20.0), "map_drop": ("<=", 1.0), "latency_ms": ("<=", 8.0)})
    mixed = Problem.read(
        {"limits": {"min_map": (">=", 20), "max_map_drop": ["<=", 1], "latency_ms": ("<=", 8)}}
    )
    assert short == long == mixed
    assert Problem.model_validate_json(long.model_dump_json()) == long
    assert list(short.limits) == list(long.limits)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"objectives": ["map", "speed"]}, "objectives: 'speed': choose from map, latency_ms"),
        ({"objectives": ["map", "map"]}, "each only once"),
        ({"objectives": []}, "at least one"),
        ({"limits": {"max_speed": 1.0}}, "limits.max_speed: 1.0: limit one of map"),
        ({"limits": {"latency_ms": 1.0}}, "write max_latency_ms: bound"),
        ({"limits": {"max_latency_ms": (">=", 1.0)}}, "write max_latency_ms: bound"),
        ({"limits": {"max_latency_ms": float("nan")}}, "must be a finite number"),
        ({"limits": {"max_latency_ms": "fast"}}, "must be a finite number"),
        ({"limits": {"max_latency_ms": True}}, "must be a finite number"),
        ({"limits": {"max_map": 1.0, "min_map": 0.5}}, "map already has a limit"),
        ({"limits": [1]}, "write them as name: bound"),
        ({"limit": {}}, "limit: no such field; there are: objectives, limits, losses_from"),
    ],
)
def test_bad_problems(data: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Problem.read(data)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dominates() -> None:
    assert dominates([1, 2], [1, 3])
    assert dominates([0, 2], [1, 3])
    assert not dominates([1, 3], [1, 3])
    assert not dominates([0, 4], [1, 3])
    assert not dominates([1, 3], [0, 4])


def test_front_and_ranks_by_hand() -> None:
    points = [(3, 1), (1, 3), (2, 2), (2, 2), (3, 3), (2, 3), (np.nan, 0), (4, 4)]
    assert front(points) == [0, 1, 2]
    assert non_dominated_ranks(points).tolist() == [0, 0, 0, 0, 2, 1, 4, 3]
    assert front([]) == []
    assert non_dominated_ranks([]).tolist() == []
    assert front([(np.nan, 1)]) == []


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_front_and_ranks_agree_with_the_definition(width: int) -> None:
    points = np.random.default_rng(width).integers(0, 6, size=(60, width)).astype(float)
    free = [i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)]
    first = [i for i in free if not any((points[j] == points[i]).all() for j in range(i))]
    assert front(points) == first
    ranks = non_dominated_ranks(points)
    assert [i for i, rank in enumerate(ranks) if rank == 0] == free
    for i, rank in enumerate(ranks):  # a point's rank is one more than the worst rank that dominates it
        assert rank == max((ranks[j] + 1 for j in range(60) if dominates(points[j], points[i])), default=0)


def test_hypervolume_by_hand() -> None:
    # Staircase under (4, 4): 3 x 1 + 2 x 1 + 1 x 1 squares.
    assert hypervolume([(1, 3), (2, 2), (3, 1)], (4, 4)) == 6.0
    assert hypervolume([(2, 2), (1, 3), (3, 1), (3, 3), (2, 2), (0, 5), (np.nan, 0)], (4, 4)) == 6.0
    assert hypervolume([(4, 0), (0, 4)], (4, 4)) == 0.0
    assert hypervolume([], (4, 4)) == 0.0
    assert hypervolume([(1,), (3,)], (4,)) == 3.0
    # A 2 x 2 x 2 and a 1 x 1 x 3 box share a 1 x 1 x 2 one.
    assert hypervolume([(1, 1, 1), (2, 2, 0)], (3, 3, 3)) == 8 + 3 - 2
    with pytest.raises(ValueError, match=r"\(N, 2\)"):
        hypervolume([(1, 1, 1)], (4, 4))


def included_and_excluded(points: NDArray[np.float64], corner: NDArray[np.float64]) -> float:
    """Volume of a union of boxes by inclusion and exclusion."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for some in combinations(points, size):
            total -= (-1) ** size * np.prod(np.clip(corner - np.max(some, axis=0), 0, None))
    return float(total)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
def test_hypervolume_agrees_with_inclusion_and_exclusion(width: int) -> None:
    rng = np.random.default_rng(width)
    for _ in range(10):
        points = rng.random((9, width)) * 1.1
        corner = np.ones(width)
        assert hypervolume(points, corner) == pytest.approx(included_and_excluded(points, corner), abs=1e-12)


def test_hypervolume_of_many_points_agrees_with_sampling() -> None:
    rng = np.random.default_rng(0)
    points = np.abs(rng.normal(size=(200, 3)))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    points = 1 - points  # a curved front of 200
    samples = rng.random((40_000, 3))
    hit = np.zeros(len(samples), dtype=bool)
    for point in points:
        hit |= (samples >= point).all(axis=1)
    # The standard error of a share of 40,000 samples is at most 0.0025.
    assert hypervolume(points, (1, 1, 1)) == pytest.approx(hit.mean(), abs=0.01)
