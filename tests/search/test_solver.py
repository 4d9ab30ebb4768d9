from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from evaluators.latency_model import LatencyModel, features
from search.seeds import narrowest, own_functions, seed_recipes, smooth_starts, uniform_starts
from search.solver import PathPoint, at_damages, damage_path
from spaces.capabilities import Capabilities
from spaces.detectors.yolox import YoloX
from spaces.sites import find_sites
from spaces.space import build_space
from spaces.table import SpaceTable
from tests.search.toy_space import resizing_table, toy_table


def toy_model(table: SpaceTable) -> LatencyModel:
    count = features(table, table.base).shape[1]
    weights = np.full(count, 0.02)
    weights[[0, 4, 8]] = 0.8, 0.45, 0.3  # multiplications of dense layers at 32, 16, 8 bits
    return LatencyModel(table, weights, 0.0)


def random_damage(table: SpaceTable, seed: int) -> NDArray[np.float64]:
    random = np.random.default_rng(seed)
    damage = np.full((len(table.names), int(table.sizes.max())), np.inf)
    for p, size in enumerate(table.sizes):
        damage[p, :size] = np.concatenate([[0.0], np.cumsum(random.exponential(size=size - 1))])
    return damage


def test_neighbours_are_the_shapes_of_single_changes() -> None:
    table = toy_table()
    random = np.random.default_rng(0)
    for _ in range(10):
        current = random.integers(0, table.sizes)
        parameter = np.arange(len(table.sizes))
        option = random.integers(0, table.sizes)
        changed = np.repeat(current[None], len(parameter), axis=0)
        changed[parameter, parameter] = option
        fast, slow = table.neighbours(current, parameter, option), table.shapes(changed)
        for name in ("inputs", "outputs", "macs", "bits"):
            np.testing.assert_allclose(getattr(fast, name), getattr(slow, name))


@pytest.mark.parametrize("seed", range(5))
def test_near_the_exact_front_of_a_space_that_can_be_enumerated(seed: int) -> None:
    table = toy_table()
    model, damage = toy_model(table), random_damage(table, seed)
    base = np.zeros(len(table.names), np.int64)
    path = damage_path(damage, model, [base])
    every = np.array(list(itertools.product(*(range(size) for size in table.sizes))))
    cost = damage[np.arange(len(table.names)), every].sum(axis=1)
    latency = model.predict(every)
    for point in path:
        assert point.damage == pytest.approx(damage[np.arange(len(base)), point.options].sum())
        assert point.latency == pytest.approx(float(model.predict(point.options[None])[0]))
        fastest = latency[cost <= point.damage + 1e-9].min()
        assert point.latency <= 1.1 * fastest  # greedy: not exact, never far
    latencies = [point.latency for point in path]
    damages = [point.damage for point in path]
    assert latencies == sorted(latencies, reverse=True)
    assert damages == sorted(damages)


def plain_descent(
    damage: NDArray[np.float64], model: LatencyModel, start: NDArray[np.int64]
) -> list[list[int]]:
    """The solver's steps by predicting every recipe of a single change as a whole."""
    current, steps = start.copy(), [start.tolist()]
    while True:
        latency = float(model.predict(current[None])[0])
        best: tuple[float, int, int] | None = None
        for p, o in zip(*np.nonzero(np.isfinite(damage)), strict=True):
            changed = current.copy()
            changed[p] = o
            extra = damage[p, o] - damage[p, current[p]]
            saved = latency - float(model.predict(changed[None])[0])
            if extra >= 0 and saved > 1e-6 and (best is None or saved / max(extra, 1e-9) > best[0]):
                best = saved / max(extra, 1e-9), int(p), int(o)
        if best is None:
            return steps
        current[best[1]] = best[2]
        steps.append(current.tolist())


@pytest.mark.parametrize("make", [toy_table, resizing_table])
@pytest.mark.parametrize("seed", range(4))
def test_steps_are_those_of_predicting_everything_anew(seed: int, make: Callable[[], SpaceTable]) -> None:
    table = make()
    model, damage = toy_model(table), random_damage(table, seed)
    for start in uniform_starts(table):
        fast = damage_path(damage, model, [start], slowest_useful=np.inf)
        assert [point.options.tolist() for point in fast] == plain_descent(damage, model, start)
        for point in fast:
            assert point.latency == pytest.approx(float(model.predict(point.options[None])[0]))


@pytest.mark.parametrize(("cost", "place"), [(0.01, 1), (1e6, None)])
def test_a_smaller_input_is_taken_when_it_is_the_cheapest_and_not_at_any_price(
    cost: float, place: int | None
) -> None:
    """A quarter of the positions saves about three quarters of the time, more than any other change."""
    table = resizing_table()
    model, damage = toy_model(table), random_damage(table, 0)
    size = table.names.index("size input")
    damage[size, 1] = cost
    path = damage_path(damage, model, [np.zeros(len(table.names), np.int64)], slowest_useful=np.inf)
    taken = [k for k, point in enumerate(path) if point.options[size] == 1]
    if place is None:
        assert taken[0] > len(path) // 2
    else:
        assert taken == list(range(place, len(path)))


@pytest.mark.parametrize("limit", [0.0, 0.5, 2.0, 100.0])
def test_a_limit_leaves_out_only_what_is_beyond_it(limit: float) -> None:
    table = toy_table()
    model, damage = toy_model(table), random_damage(table, 1)
    whole = damage_path(damage, model, uniform_starts(table))
    short = damage_path(damage, model, uniform_starts(table), limit=limit)
    expected = [point for point in whole if point.damage <= limit] or whole[:1]
    assert [p.options.tolist() for p in short] == [p.options.tolist() for p in expected]


def test_options_of_unknown_damage_are_never_taken() -> None:
    table = toy_table()
    damage = random_damage(table, 0)
    damage[0, 1:] = np.inf
    base = np.zeros(len(table.names), np.int64)
    assert all(point.options[0] == 0 for point in damage_path(damage, toy_model(table), [base]))


def test_at_damages_takes_the_last_point_within() -> None:
    points = [PathPoint(np.array([k]), float(k), 1 / (k + 1)) for k in range(5)]
    chosen = at_damages(points, np.array([0.5, 0.7, 2.0, 9.0]))
    assert [point.damage for point in chosen] == [0.0, 2.0, 4.0]


def test_whole_widths_are_seeds_but_for_those_that_need_training() -> None:
    table = toy_table()
    rows = uniform_starts(table)[1:]
    assert [narrowest(table, row) for row in rows] == [16.0, 8.0]
    assert narrowest(table, np.zeros(len(table.names), np.int64)) == 32.0


@pytest.mark.parametrize(("polynomial", "gains"), [(0.01, True), (0.5, False)])
def test_polynomials_in_all_stages_are_a_seed_where_they_gain(polynomial: float, gains: bool) -> None:
    detector = YoloX("narrow", 3, (64, 64), depth=0.33, width=0.125)
    sites = find_sites(detector, detector.build())
    capabilities = Capabilities(bit_widths=(32, 16, 8), channel_granule=8, fuses_elementwise=True)
    table = SpaceTable(build_space(detector, sites, capabilities, ("quantize", "activate"), "stage"))
    smooth = smooth_starts(table)
    assert [narrowest(table, row) for row in smooth] == [32.0, 16.0, 8.0]
    shapes = table.shapes(np.stack(smooth))
    assert (shapes.polynomial > 0).any(axis=1).all()
    assert not (shapes.costly * shapes.polynomial).any()
    assert all(not table.shapes(own_functions(table, row)[None]).polynomial.any() for row in smooth)
    # dense, depthwise, written, costly, polynomial, started: at 32, then at 16, then at 8 bits
    weights = np.full(features(table, table.base).shape[1], 0.01)
    weights[[0, 6, 12]], weights[[3, 9, 15]], weights[[4, 10, 16]] = (0.6, 0.3, 0.4), 0.2, polynomial
    seeds = seed_recipes(table, random_damage(table, 0), LatencyModel(table, weights, 0.0), count=1)
    assert any(np.array_equal(row, smooth[1]) for row in seeds) == gains
    assert [narrowest(table, row) for row in seeds[:2]] == [16.0, 8.0]


def test_nothing_is_smooth_where_no_stage_offers_it() -> None:
    assert smooth_starts(toy_table()) == []


def test_where_nothing_costs_anything_the_fastest_is_the_seed() -> None:
    table = toy_table()
    free = np.where(np.isfinite(random_damage(table, 0)), 0.0, np.inf)
    seeds = seed_recipes(table, free, toy_model(table))
    uniform = [row.tolist() for row in uniform_starts(table)[1:]]
    solved = [row for row in (row.tolist() for row in seeds) if row not in uniform]
    fastest = damage_path(free, toy_model(table), uniform_starts(table))[-1].options.tolist()
    assert fastest in solved + uniform
    assert len(solved) <= 1


@pytest.mark.parametrize("unknown", [slice(1, None), slice(1, 2)])
def test_one_unknown_option_leaves_seeds_from_mild_to_strong(unknown: slice) -> None:
    """All widths of a layer, or bfloat16 alone, could not be measured."""
    table = toy_table()
    damage = random_damage(table, 0)
    layer = table.names.index("bits wide")
    damage[layer, unknown] = np.inf
    seeds = seed_recipes(table, damage, toy_model(table))
    solved = seeds[len(uniform_starts(table)) - 1 :]
    costs = [damage[np.arange(len(table.names)), row].sum() for row in solved]
    assert len(costs) >= 2
    assert np.isfinite(costs).all()
    assert costs == sorted(set(costs))
