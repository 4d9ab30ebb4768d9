from __future__ import annotations

import numpy as np
import optuna
import pytest

from spaces.capabilities import Capabilities
from spaces.detectors.registry import make_detector
from spaces.effects import bits_by_layer, kept_by_site, total_macs
from spaces.errors import InputError
from spaces.recipe import Prune, Recipe
from spaces.sites import find_sites
from spaces.space import Granularity, SearchSpace, build_space
from spaces.table import SpaceTable
from tests.spaces.toy import ToyDetector

CPU = Capabilities(bit_widths=(32, 16, 8), channel_granule=8)


def toy_space(granularity: Granularity = "layer") -> SearchSpace:
    detector = ToyDetector()
    return build_space(detector, find_sites(detector, detector.build()), CPU, granularity=granularity)


def random_params(space: SearchSpace, seed: int) -> dict[str, float]:
    random = np.random.default_rng(seed)
    return {name: p.values[random.integers(len(p.values))] for name, p in space.parameters.items()}


@pytest.mark.parametrize("granularity", ["layer", "block", "stage"])
def test_parameters_make_a_recipe_and_a_recipe_its_parameters(granularity: Granularity) -> None:
    space = toy_space(granularity)
    for seed in range(20):
        params = random_params(space, seed)
        recipe = space.recipe(params)
        assert space.contains(recipe)
        assert space.recipe(space.params(recipe)) == recipe
    assert space.recipe(space.identity_params()).is_identity


def test_optuna_proposes_only_what_the_space_holds() -> None:
    space = toy_space()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        params = study.ask(space.distributions()).params
        assert space.contains(space.recipe(params))


def test_coarser_spaces_have_fewer_parameters() -> None:
    sizes = [len(toy_space(granularity).parameters) for granularity in ("layer", "block", "stage")]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 3  # sparsity body, bits body, bits head


def test_yolox_nano_stays_readable() -> None:
    detector = make_detector("yolox_nano", 80)
    network = detector.build()
    sites = find_sites(detector, network, 120)
    space = build_space(detector, sites, CPU)
    assert len(sites.channel) == 67
    assert len(space.parameters) <= 120
    assert not any("preds" in name for name in space.parameters if name.startswith("sparsity"))


def test_foreign_recipes_and_values_are_refused() -> None:
    space = toy_space()
    foreign = Recipe(detector="toy", choices=(Prune(site="stem.0", sparsity=0.3),))
    assert not space.contains(foreign)
    with pytest.raises(InputError, match=r"sparsity stem.0: 0.3: choose one of 0, 0.5"):
        space.recipe({"sparsity stem.0": 0.3})
    with pytest.raises(InputError, match="is none of this space"):
        space.recipe({"sparsity nowhere": 0.5})
    with pytest.raises(InputError, match="the space is of toy"):
        space.params(Recipe(detector="other"))
    with pytest.raises(InputError, match=r"choose from prune, .*quantize"):
        build_space(ToyDetector(), space.sites, CPU, methods=("melt",))


def test_the_table_agrees_with_the_slow_way() -> None:
    space = toy_space()
    table = SpaceTable(space)
    params = [random_params(space, seed) for seed in range(30)]
    shapes = table.shapes(table.options(params))
    for row, one in enumerate(params):
        recipe = space.recipe(one)
        widths = space.sites.widths(kept_by_site(recipe, space.sites))
        assert shapes.inputs[row].tolist() == [widths[name][0] for name in table.layers]
        assert shapes.outputs[row].tolist() == [widths[name][1] for name in table.layers]
        assert shapes.macs[row].sum() == total_macs(recipe, space.sites)
        bits = bits_by_layer(recipe, space.sites)
        assert shapes.bits[row].tolist() == [bits[name] for name in table.layers]
        assert table.params(table.options([one])[0]) == one
