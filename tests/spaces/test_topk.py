"""Fewer boxes in suppression: which numbers are offered, what they change, and how recipes keep them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from spaces.apply import apply, check, rebuild, same_state, save
from spaces.best_boxes import SUPPRESSION
from spaces.capabilities import Capabilities
from spaces.detectors.base import Detector
from spaces.detectors.registry import make_detector
from spaces.detectors.yolox import YoloX
from spaces.errors import InputError
from spaces.methods.base import Method
from spaces.methods.testing import MethodContract
from spaces.methods.topk import PreNmsTopK
from spaces.recipe import Prune, Recipe, TopK
from spaces.sites import Sites, find_sites
from spaces.space import SearchSpace, build_space
from spaces.table import SpaceTable
from spaces.testing import lively_network

CPU = Capabilities(bit_widths=(32, 16), channel_granule=8)


@cache
def base() -> tuple[YoloX, nn.Module, Sites]:
    """16 x 20 + 8 x 10 + 4 x 5 = 420 cells. Not to be changed."""
    detector = YoloX("narrow", 3, (128, 160), depth=0.33, width=0.125)
    network = lively_network(detector)
    return detector, network, find_sites(detector, network, topk=1000)


def space(*methods: str) -> SearchSpace:
    detector, _, sites = base()
    return build_space(detector, sites, CPU, methods)


class TestPreNmsTopK(MethodContract):
    @pytest.fixture
    def method(self) -> Method:
        return PreNmsTopK()

    @pytest.fixture
    def detector(self) -> Detector:
        return base()[0]

    @pytest.fixture
    def sites(self, detector: Detector, network: nn.Module) -> Sites:
        return find_sites(detector, network, topk=1000)


def test_numbers_below_three_quarters_of_the_bases_are_offered() -> None:
    offered = space("topk").parameters["top-k suppression"]
    assert offered.values == (420.0, 200.0, 100.0, 50.0)  # 500 would be all, and 420 is all there are
    detector, network, _ = base()
    few = find_sites(detector, network, topk=130)
    assert few.suppression is not None
    assert few.suppression.limit == 130
    assert [c.count for c in PreNmsTopK().options(few, CPU)[SUPPRESSION]] == [0, 50]  # type: ignore[union-attr]
    assert PreNmsTopK().options(find_sites(detector, network), CPU) == {}


def test_pairs_of_a_box_and_a_class_count_where_each_may_be_found() -> None:
    detector = make_detector("retinanet_resnet18_fpn", 3, (64, 64))
    sites = find_sites(detector, detector.build(), topk=10**6)
    cells = 64 + 16 + 4 + 1 + 1
    assert sites.suppression is not None
    assert sites.suppression.limit == cells * 9 * 3


@pytest.mark.parametrize(
    ("choice", "message"),
    [(TopK(site="elsewhere", count=50), "elsewhere"), (TopK(count=421), "421.*the base has 420")],
)
def test_what_cannot_be_is_refused(choice: TopK, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(Recipe(detector="narrow", choices=(choice,)), base()[2])


def test_a_stored_recipe_keeps_its_number_and_needs_no_training(tmp_path: Path) -> None:
    detector, network, sites = base()
    recipe = Recipe(detector="narrow", choices=(TopK(count=100),))
    draft = apply(network, recipe, sites)
    assert draft.topk == 100
    assert not draft.changed
    save(draft, recipe, tmp_path)
    again, rebuilt = rebuild(detector.build(), tmp_path)
    assert (again, rebuilt.topk) == (recipe, 100)
    assert same_state(rebuilt.network.state_dict(), draft.network.state_dict())


def test_the_table_counts_boxes_behind_the_last_layer() -> None:
    whole = space("prune", "topk")
    table = SpaceTable(whole)
    assert table.shortens
    assert not SpaceTable(space("prune")).shortens
    prune = next(name for name, p in whole.parameters.items() if p.kind == "prune")
    params = [{}, {"top-k suppression": 100.0}, {"top-k suppression": 50.0, prune: 0.5}]
    options = table.options([whole.identity_params() | one for one in params])
    shapes = table.shapes(options)
    np.testing.assert_allclose(shapes.boxes[:, -1], [1, 100 / 420, 50 / 420])
    assert not shapes.boxes[:, :-1].any()
    near = table.neighbours(options[0], np.array([table.names.index("top-k suppression")]), np.array([2]))
    np.testing.assert_allclose(near.boxes, shapes.boxes[1:2])


def test_parameters_and_recipes_go_back_and_forth() -> None:
    whole = space("prune", "topk")
    params = whole.identity_params() | {"top-k suppression": 200.0}
    recipe = whole.recipe(params)
    assert recipe.choices == (TopK(count=200),)
    assert whole.params(recipe) == params
    assert whole.recipe(whole.identity_params()).is_identity
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert not [c for c in recipe.choices if isinstance(c, Prune)]
