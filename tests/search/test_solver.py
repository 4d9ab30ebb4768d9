from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from evaluators.latency_model import LatencyModel, features
from search.solver import PathPoint, at_damages, damage_path
from spaces.table import SpaceTable
from tests.search.toy_space import toy_table


def toy_model(table: SpaceTable) -> LatencyModel:
    count = features(table, table.base).shape[1]
    weights = np.full(count, 0.02)
    weights[[0, 3, 6]] = 0.8, 0.45, 0.3  # multiplications of dense layers at 32, 16, 8 bits
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
