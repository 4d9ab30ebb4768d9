"""A search over sparsities, ranks and bit-widths, told as the search tells it, of a made-up detector."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from search.seeds import seed_recipes, uniform_starts
from search.sensitivity import damage_table, single_changes
from search.solver import damage_path
from search.strategy import probe_recipes
from spaces.capabilities import Capabilities
from spaces.detectors.yolox import YoloX
from spaces.recipe import Factorize, Quantize
from spaces.sites import find_sites
from spaces.space import build_space
from spaces.table import SpaceTable
from tests.search.test_sampler import MadeUp
from tests.search.test_solver import plain_descent, random_damage, toy_model

METHODS = ("prune", "factorize", "quantize")


@pytest.fixture(scope="module")
def table() -> SpaceTable:
    detector = YoloX("narrow", 3, (64, 64), depth=0.33, width=0.25)
    capabilities = Capabilities(bit_widths=(32, 8), channel_granule=8)
    sites = find_sites(detector, detector.build())
    return SpaceTable(build_space(detector, sites, capabilities, METHODS, "stage"))


@pytest.fixture(scope="module")
def problem(table: SpaceTable) -> MadeUp:
    problem = MadeUp()
    problem.table, problem.model = table, toy_model(table)
    problem.damage = random_damage(table, 0)
    return problem


def test_it_proposes_ranks_beside_the_rest_and_finishes(problem: MadeUp) -> None:
    ranks = np.array([name.startswith("rank ") for name in problem.table.names])
    cheap = copy.copy(problem)
    cheap.damage = problem.damage * np.where(ranks, 0.1, 1.0)[:, None]
    trials = cheap.run(cheap.sampler(0), 12).get_trials()
    assert all(trial.values for trial in trials)
    recipes = [problem.table.space.recipe(trial.params) for trial in trials]
    assert len({recipe.key for recipe in recipes}) == 12
    kinds = [{type(choice) for choice in recipe.choices} for recipe in recipes]
    assert any({Factorize, Quantize} <= found for found in kinds)
    assert min(trial.values[1] for trial in trials) < 0.8 * trials[0].values[1]


def test_probes_and_sensitivities_cover_ranks(problem: MadeUp) -> None:
    table = problem.table
    probed = [recipe.of_kind(Factorize) for recipe in probe_recipes(table, 16, 0)]
    assert sum(map(bool, probed)) >= 8
    changes = single_changes(table.space)
    known = {recipe.key: float(option) for _, option, recipe in changes}
    damage = damage_table(table, [{"damage": known}])
    ranks = [p for p, name in enumerate(table.names) if name.startswith("rank ")]
    assert ranks
    for p in ranks:
        assert damage[p, : table.sizes[p]].tolist() == list(range(table.sizes[p]))
        assert np.isinf(damage[p, table.sizes[p] :]).all()


def test_seeds_use_ranks_where_they_cost_little(problem: MadeUp) -> None:
    ranks = np.array([name.startswith("rank ") for name in problem.table.names])
    damage = problem.damage * np.where(ranks, 0.01, 1.0)[:, None]
    seeds = seed_recipes(problem.table, damage, problem.model)
    uniform = uniform_starts(problem.table)[1:]
    assert len(seeds) > len(uniform) > 0
    assert all((one == other).all() for one, other in zip(seeds, uniform, strict=False))
    assert all(options[ranks].any() for options in seeds[len(uniform) :])


@pytest.mark.parametrize("seed", range(3))
def test_the_solver_steps_as_if_it_predicted_everything_anew(problem: MadeUp, seed: int) -> None:
    table, model = problem.table, problem.model
    damage = random_damage(table, seed)
    start = np.zeros(len(table.names), np.int64)
    path = damage_path(damage, model, [start], slowest_useful=np.inf)
    predicted = model.predict(np.stack([point.options for point in path]))
    assert [point.latency for point in path] == pytest.approx(predicted.tolist())
    steps = plain_descent(damage, model, start)
    assert all(point.options.tolist() in steps for point in path)
