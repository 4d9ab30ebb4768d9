"""Fewer proposals: the contract of methods, what is left of a network, and what it multiplies."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from spaces.apply import apply, check, rebuild, same_state, save
from spaces.capabilities import Capabilities
from spaces.detectors.base import Detector
from spaces.detectors.faster_rcnn import FasterRCNN
from spaces.detectors.faster_rcnn_variants import DIGITS
from spaces.detectors.yolox import YoloX
from spaces.effects import total_macs
from spaces.errors import InputError
from spaces.layers import count_macs
from spaces.methods.base import Method
from spaces.methods.proposals import ProposalCount
from spaces.methods.testing import MethodContract
from spaces.recipe import Drop, Factorize, Proposals, Prune, Recipe
from spaces.sites import Sites, find_sites
from spaces.space import SearchSpace, build_space
from spaces.table import SpaceTable
from spaces.testing import lively_network, noise, outputs_of

SIZE = (64, 64)
SITE = "roi_heads"
CPU = Capabilities(bit_widths=(32, 16), channel_granule=8)


@cache
def base() -> tuple[FasterRCNN, nn.Module, Sites]:
    """Not to be changed."""
    detector = FasterRCNN("small", 3, SIZE, DIGITS)
    network = lively_network(detector)
    return detector, network, find_sites(detector, network)


class TestProposalCount(MethodContract):
    same_shapes = False

    @pytest.fixture
    def method(self) -> Method:
        return ProposalCount()

    @pytest.fixture
    def detector(self) -> Detector:
        return base()[0]


def of(*choices: Drop | Factorize | Proposals | Prune) -> Recipe:
    return Recipe(detector="small", choices=choices)


def quarter(*others: Factorize | Prune) -> Recipe:
    return of(Proposals(site=SITE, share=0.25), *others)


def space(*methods: str) -> SearchSpace:
    detector, _, sites = base()
    return build_space(detector, sites, CPU, methods)


def test_the_second_stage_is_a_site_and_no_other_network_has_one() -> None:
    sites = base()[2]
    found = sites.proposals[SITE]
    assert found.count == 48
    assert [layer.rpartition(".")[2] for layer in found.layers] == ["fc6", "fc7", "cls_score", "bbox_pred"]
    assert list(sites.proposals) == [SITE]
    plain = YoloX("narrow", 3, (32, 32), depth=0.33, width=0.125)
    assert not find_sites(plain, plain.build()).proposals


def test_the_best_regions_are_left_and_answer_as_before() -> None:
    detector, network, sites = base()
    images = noise(detector, 2)
    whole = outputs_of(network, images)
    draft = apply(network, quarter(), sites)
    assert draft.proposals == {SITE: 12}
    assert not draft.changed  # no weight did
    assert same_state(draft.network.state_dict(), network.state_dict())
    assert network.roi_heads.proposals == 48  # type: ignore[union-attr]
    fewer = outputs_of(draft.network, images)
    assert torch.equal(fewer[2], whole[2][:, :12])
    for k in (0, 1):
        assert torch.equal(fewer[k], whole[k])
    for k in (3, 4):
        torch.testing.assert_close(fewer[k], whole[k][:, :12], rtol=1e-4, atol=1e-4)


def test_the_fewer_the_farther_from_the_base() -> None:
    detector, network, sites = base()
    images = noise(detector, 2)
    whole = outputs_of(network, images)
    distances = []
    for choice in ProposalCount().options(sites, CPU)[SITE]:
        found = outputs_of(apply(network, of(choice), sites).network, images)  # type: ignore[arg-type]
        distances.append(float(detector.distillation(found, whole)))
    assert distances[0] == pytest.approx(0.0, abs=1e-5)
    assert distances == sorted(set(distances))


def test_a_recipe_is_rebuilt_with_its_number(tmp_path: Path) -> None:
    detector, network, sites = base()
    recipe = quarter(*(Prune(site=name, sparsity=0.5) for name in sites.channel if "fc6" in name))
    draft = apply(network, recipe, sites)
    save(draft, recipe, tmp_path)
    again, rebuilt = rebuild(detector.build().eval(), tmp_path)
    assert again == recipe
    assert rebuilt.proposals == {SITE: 12}
    images = noise(detector, 1)
    assert all(map(torch.equal, outputs_of(rebuilt.network, images), outputs_of(draft.network, images)))


def test_multiplications_are_those_of_the_network() -> None:
    """By the recipe, by the table and counted on the network itself; also of layers that methods share."""
    _, network, sites = base()
    everything = space("prune", "factorize", "proposals")
    table = SpaceTable(everything)
    rank = next(p for p in everything.parameters.values() if p.kind == "factorize" and "fc6" in p.name)
    pruned = next(p for p in everything.parameters.values() if p.kind == "prune" and "fc6" in p.name)
    names = [f"proposals {SITE}", rank.name, pruned.name]
    for params in (
        {names[0]: 0.125},
        {names[0]: 0.5, names[1]: rank.values[-1]},
        {names[0]: 0.25, names[1]: rank.values[-1], names[2]: pruned.values[2]},
    ):
        recipe = everything.recipe(params)
        counted = count_macs(apply(network, recipe, sites).network, SIZE)
        assert total_macs(recipe, sites) == counted
        options = table.options([everything.identity_params() | params])
        assert table.shapes(options).macs.sum() == pytest.approx(counted)
    assert total_macs(quarter(), sites) < total_macs(of(), sites)


def test_the_fast_way_agrees_with_the_slow_one() -> None:
    table = SpaceTable(space("prune", "quantize", "factorize", "proposals"))
    random = np.random.default_rng(0)
    for _ in range(5):
        current = random.integers(0, table.sizes)
        parameter = np.arange(len(table.names))
        option = random.integers(0, table.sizes)
        recipes = np.repeat(current[None], len(parameter), axis=0)
        recipes[parameter, parameter] = option
        slow, fast = table.shapes(recipes), table.neighbours(current, parameter, option)
        for name in ("macs", "positions", "rank_in", "inputs"):
            np.testing.assert_allclose(getattr(fast, name), getattr(slow, name), rtol=1e-12)


def test_it_is_off_unless_the_space_asks_for_it() -> None:
    assert not any("proposals" in name for name in space("prune", "quantize").parameters)
    assert space("proposals").parameters[f"proposals {SITE}"].values == (1.0, 0.75, 0.5, 0.25, 0.125)
    table = SpaceTable(space("prune", "quantize"))
    assert not table.proposes
    assert len(table.base.positions[0]) == len(table.layers)


def test_few_proposals_offer_only_numbers_that_differ() -> None:
    detector, network, _ = base()
    few = apply(network, quarter(), base()[2]).network
    few.roi_heads.proposals = 3  # type: ignore[union-attr, assignment]
    sites = find_sites(detector, few)
    shares = [c.share for c in ProposalCount().options(sites, CPU)[SITE]]  # type: ignore[union-attr]
    assert [sites.proposals[SITE].kept(share) for share in shares] == [3, 2, 1]
    assert shares[0] == 1.0


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match=r"recipe\.proposals\.site: 'rpn': has no proposals"):
        check(of(Proposals(site="rpn", share=0.5)), base()[2])
    for share in ("0", "1.5"):
        with pytest.raises(InputError, match="share"):
            Recipe.from_json(
                '{"detector": "small", "choices": [{"kind": "proposals", "site": "roi_heads", "share": '
                + share
                + "}]}"
            )
