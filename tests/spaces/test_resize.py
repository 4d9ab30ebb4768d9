"""Smaller inputs as a choice: which sizes are offered, what they cost, and how recipes keep them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spaces.apply import apply, check, rebuild, same_state, save
from spaces.capabilities import Capabilities
from spaces.detectors.base import Detector, Outputs, Preprocess
from spaces.detectors.registry import make_detector
from spaces.detectors.yolox import YoloX
from spaces.effects import facts_under, total_macs
from spaces.errors import InputError
from spaces.inputs import Size, input_site, load_resized, smaller_sizes
from spaces.layers import count_macs, trace_layers
from spaces.methods.base import Method
from spaces.methods.resize import Resizing
from spaces.methods.testing import MethodContract
from spaces.recipe import Factorize, Prune, Recipe, Resize, is_identity
from spaces.sites import Sites, find_sites
from spaces.space import SearchSpace, build_space
from spaces.table import SpaceTable
from spaces.testing import lively_network, noise, outputs_of
from tests.spaces.toy import ToyDetector, ToyNetwork


def narrow(size: Size) -> YoloX:
    return YoloX("narrow", 3, size, depth=0.33, width=0.125)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return lively_network(narrow((96, 128)))


@pytest.fixture(scope="module")
def sites(base: nn.Module) -> Sites:
    """Of a base at 96 x 128, which (64, 96), 5/8 of it, is offered of, and one side smaller."""
    return find_sites(narrow((96, 128)), base, resized=narrow)


@pytest.fixture(scope="module")
def space(sites: Sites) -> SearchSpace:
    methods = ("prune", "factorize", "resize")
    return build_space(narrow((96, 128)), sites, Capabilities((32, 16, 8), 8), methods)


class TestResizing(MethodContract):
    @pytest.fixture
    def method(self) -> Method:
        return Resizing()

    @pytest.fixture
    def detector(self) -> Detector:
        return narrow((96, 96))

    @pytest.fixture
    def sites(self, detector: Detector, network: nn.Module) -> Sites:
        return find_sites(detector, network, resized=narrow)


@pytest.mark.parametrize(
    ("size", "smaller"),
    [
        (  # both sides: 364, 312, 260, 208; one: 390, 364, 312
            (416, 416),
            [
                *((384, 416), (416, 384), (352, 416), (416, 352), (320, 416), (416, 320)),
                *((352, 352), (320, 320), (256, 256), (224, 224)),
            ],
        ),
        ((300, 300), [(256, 256), (224, 224), (192, 192), (160, 160)]),  # whose sides are no multiples
        ((160, 160), [(128, 160), (160, 128), (128, 128), (96, 96)]),
        (
            (320, 416),
            [
                *((320, 384), (288, 416), (320, 352), (256, 416), (320, 320)),
                *((288, 352), (256, 320), (192, 256), (160, 224)),
            ],
        ),
        ((96, 128), [(96, 96), (64, 128), (64, 96)]),  # 1/2 of both leaves the aspect: 64 x 64
        ((32, 32), []),
    ],
)
def test_multiples_of_32_that_keep_the_aspect_or_one_side(size: Size, smaller: list[Size]) -> None:
    assert list(smaller_sizes(size)) == smaller
    for height, width in smaller:
        assert height % 32 == width % 32 == 0
        one_side = height == size[0] or width == size[1]
        assert one_side or height / width == pytest.approx(size[0] / size[1], rel=0.13)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("yolox_nano", (96, 96)),
        ("ssdlite320_mobilenet_v3_large", (96, 96)),
        ("ssd300_vgg16", (96, 96)),
        ("fasterrcnn_digits", (96, 96)),
        ("retinanet_resnet18_fpn", (128, 128)),
        ("fcos_resnet18_fpn", (128, 128)),
    ],
)
def test_every_family_runs_at_a_smaller_size_with_the_same_weights(name: str, size: Size) -> None:
    make: Callable[[Size], Detector] = partial(make_detector, name, 3)
    detector = make(size)
    network = detector.build().eval()
    found = input_site(size, trace_layers(network, size), network, make)
    assert found is not None
    assert list(found.smaller) == list(smaller_sizes(size))
    smallest = min(found.smaller)
    other = make(smallest)
    resized = other.build()
    resized.load_state_dict(network.state_dict())
    assert same_state(resized.state_dict(), network.state_dict())
    outputs = outputs_of(resized.eval(), noise(other, 1))
    boxes, scores = other.decode(outputs)
    assert bool(torch.isfinite(boxes).all() and torch.isfinite(scores).all())
    macs = {s: sum(f.macs(f.inputs, f.outputs) for f in facts.values()) for s, facts in found.smaller.items()}
    assert macs[smallest] == count_macs(resized, smallest) < count_macs(network, size)


class _FixedHead(ToyDetector):
    """Its last layer reads the whole image, so its weights belong to one size."""

    def __init__(self, size: Size) -> None:
        self.preprocess = Preprocess(size=size)

    def build(self) -> nn.Module:
        height, width = self.preprocess.size

        class Network(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.out = nn.Linear(3 * height * width, 4)

            def forward(self, images: Tensor) -> Outputs:
                return (self.out(images.flatten(1)),)

        return Network()


def _refuses(size: Size) -> Detector:
    raise InputError("size", size, "this family runs at 64 x 64 alone")


def test_no_size_is_offered_that_the_family_cannot_run_at() -> None:
    detector = _FixedHead((64, 64))
    network = detector.build()
    facts = trace_layers(network, (64, 64))
    assert input_site((64, 64), facts, network, _FixedHead) is None  # other weights
    assert input_site((64, 64), facts, network, _refuses) is None
    assert input_site((64, 64), facts, network, lambda size: _FixedHead((64, 64))) is None  # not heeded
    without = find_sites(detector, network, resized=_refuses)
    assert Resizing().options(without, Capabilities()) == {}
    with pytest.raises(InputError, match="no size is on offer"):
        Resizing().check(Resize(height=32, width=32), without)


@pytest.mark.parametrize(
    "error", [AssertionError("made for 96 rows"), KeyError(64), AttributeError("grid64")]
)
@pytest.mark.parametrize("where", ["constructor", "build", "forward"])
def test_a_size_at_which_the_users_code_fails_is_left_out(where: str, error: Exception) -> None:
    class Fails(ToyNetwork):
        def forward(self, images: Tensor) -> Outputs:
            if images.shape[2] < 96:
                raise error
            return super().forward(images)

    class Insists(ToyDetector):
        def __init__(self, size: Size) -> None:
            if where == "constructor" and size[0] < 96:
                raise error
            self.preprocess = Preprocess(size=size)

        def build(self) -> nn.Module:
            if where == "build" and self.preprocess.size[0] < 96:
                raise error
            return Fails() if where == "forward" else ToyNetwork()

    detector = Insists((96, 128))
    found = find_sites(detector, detector.build(), resized=Insists)
    assert found.input is not None
    assert set(found.input.smaller) == {(96, 96)}  # not 64 x 128 and 64 x 96


class _Extent(nn.Module):
    """A weight, a buffer of the input's size, and one that is learned."""

    def __init__(self, height: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)
        self.register_buffer("extent", torch.tensor([float(height)]))
        self.register_buffer("noise", torch.rand(3))
        self.norm = nn.BatchNorm2d(4)


def test_buffers_of_the_inputs_size_are_of_the_smaller_one() -> None:
    base, smaller = _Extent(96), _Extent(64)
    base.get_buffer("norm.running_mean").fill_(3.0)
    load_resized(smaller, base, fresh=_Extent(96))
    changed = {
        name
        for name, tensor in base.state_dict().items()
        if not same_state({name: tensor}, {name: smaller.state_dict()[name]})
    }
    assert changed == {"extent"}
    assert smaller.get_buffer("extent").tolist() == [64.0]
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_resized(nn.Linear(2, 2), nn.Linear(3, 3), nn.Linear(3, 3))


def test_parameters_and_recipes(space: SearchSpace, sites: Sites) -> None:
    parameter = space.parameters["size input"]
    assert parameter.values == ("96x128", "96x96", "64x128", "64x96")
    recipe = space.recipe({"size input": "64x96"})
    assert recipe.choices == (Resize(height=64, width=96),)
    assert space.params(recipe)["size input"] == "64x96"
    assert space.recipe({"size input": "96x128"}).is_identity
    assert is_identity(Resize())
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert space.summary()["size"] == 1
    assert not any(
        p.kind == "resize" for p in build_space(narrow((96, 128)), sites, Capabilities()).parameters.values()
    )


@pytest.mark.parametrize("size", [(96, 128), (64, 64), (0, 96)])
def test_other_sizes_are_refused_in_one_line(size: Size, sites: Sites) -> None:
    recipe = Recipe(detector="narrow", choices=(Resize(height=size[0], width=size[1]),))
    with pytest.raises(
        InputError, match=f"{size[0]}x{size[1]}.*choose one of 96x96, 64x128, 64x96"
    ) as caught:
        check(recipe, sites)
    assert "\n" not in str(caught.value)


def test_multiplications_are_those_of_the_network_at_that_size(sites: Sites, base: nn.Module) -> None:
    resized = narrow((64, 96)).build()
    resized.load_state_dict(base.state_dict())
    pruned = tuple(Prune(site=name, sparsity=0.5) for name in sites.channel if "dark5" in name)
    recipe = Recipe(detector="narrow", choices=(Resize(height=64, width=96), *pruned))
    draft = apply(resized, recipe, sites)
    assert total_macs(recipe, sites) == count_macs(draft.network, (64, 96))
    plain = Recipe(detector="narrow", choices=(Resize(height=64, width=96),))
    # Everything is a convolution whose map shrinks with the image: 64 x 96 of 96 x 128 pixels, a half.
    assert total_macs(plain, sites) == total_macs(Recipe(detector="narrow"), sites) / 2
    assert facts_under(plain, sites)["head.cls_preds.0"].written == (8, 12)
    assert draft.size == (64, 96)
    assert draft.changed


def test_what_is_stored_says_the_size(sites: Sites, base: nn.Module, tmp_path: Path) -> None:
    recipe = Recipe(detector="narrow", choices=(Resize(height=64, width=96),))
    draft = apply(base, recipe, sites)
    assert same_state(draft.network.state_dict(), base.state_dict())
    save(draft, recipe, tmp_path)
    again, rebuilt = rebuild(narrow((64, 96)).build(), tmp_path)
    assert (again, rebuilt.size) == (recipe, (64, 96))
    assert same_state(rebuilt.network.state_dict(), base.state_dict())


def test_a_table_holds_the_layers_of_every_size(space: SearchSpace, sites: Sites) -> None:
    table = SpaceTable(space)
    assert table.resizes
    random = np.random.default_rng(0)
    options = random.integers(0, table.sizes, (40, len(table.sizes)))
    shapes = table.shapes(options)
    assert len(set(options[:, table.names.index("size input")])) == 4
    for row, macs, positions in zip(options, shapes.macs, shapes.positions, strict=True):
        recipe = space.recipe(table.params(row))
        assert macs.sum() == pytest.approx(total_macs(recipe, sites))
        assert positions.tolist() == [f.positions for f in facts_under(recipe, sites).values()]
        assert recipe.of_kind(Factorize)  # whose factors count at the recipe's size, too


def test_neighbours_resize_like_whole_recipes(space: SearchSpace) -> None:
    table = SpaceTable(space)
    random = np.random.default_rng(1)
    for _ in range(6):
        current = random.integers(0, table.sizes)
        parameter = np.arange(len(table.sizes))
        option = random.integers(0, table.sizes)
        changed = np.repeat(current[None], len(parameter), axis=0)
        changed[parameter, parameter] = option
        fast, slow = table.neighbours(current, parameter, option), table.shapes(changed)
        layer = random.integers(0, len(table.layers), len(parameter))
        one = table.neighbours(table.held(current), parameter, option, layer)
        for name in vars(slow):
            np.testing.assert_allclose(getattr(fast, name), getattr(slow, name))
            np.testing.assert_allclose(getattr(one, name), getattr(slow, name)[parameter, layer])
