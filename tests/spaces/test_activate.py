"""Cheaper activation functions: where they are found, what they do, rebuilt and exported."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evaluators.export import export_graph
from evaluators.latency_model import LatencyModel, features
from spaces.activations import PolynomialSiLU
from spaces.apply import apply, rebuild, same_state, save
from spaces.capabilities import Capabilities
from spaces.detectors.base import Category, Outputs, Postprocess
from spaces.detectors.yolox import YoloX
from spaces.errors import InputError
from spaces.methods.activate import replace_activations
from spaces.recipe import Activate, Prune, Recipe
from spaces.sites import Sites, find_sites
from spaces.space import build_space
from spaces.table import SpaceTable
from spaces.testing import lively_network, noise, outputs_of
from tests.spaces.toy import ToyDetector

CPU = Capabilities(bit_widths=(32, 16), channel_granule=8, fuses_elementwise=True)


class SharedNetwork(nn.Module):
    """Two stages that share one activation instance, a functional norm between, one behind the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)
        self.norm = nn.BatchNorm2d(8)
        self.act1 = self.act2 = nn.SiLU(inplace=True)
        self.act3 = nn.Hardswish()
        self.last = nn.SiLU()

    def forward(self, images: Tensor) -> Outputs:
        x = self.act1(self.norm(self.first(images)))
        x = self.act2(self.second(x) * 2.0)
        return (self.last(self.out(self.act3(x))),)


class SharedDetector(ToyDetector):
    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return SharedNetwork()

    def stage_of(self, layer: str) -> str:
        return layer


@pytest.fixture(scope="module")
def yolox() -> YoloX:
    return YoloX("narrow", 3, (64, 64), depth=0.33, width=0.125, depthwise=True)


@pytest.fixture(scope="module")
def base(yolox: YoloX) -> nn.Module:
    return lively_network(yolox)


@pytest.fixture(scope="module")
def sites(yolox: YoloX, base: nn.Module) -> Sites:
    return find_sites(yolox, base)


def test_shared_instances_belong_to_the_layers_in_front_of_them() -> None:
    detector = SharedDetector()
    sites = find_sites(detector, detector.build())
    found = {name: (s.modules, s.layers, s.function) for name, s in sites.activation.items()}
    assert found == {
        "first": (("act1",), ("first",), "silu"),
        "second": (("act2", "act3"), ("second",), "hardswish+silu"),
    }
    network = detector.build()
    recipe = Recipe(detector="toy", choices=(Activate(site="second", function="relu"),))
    changed = apply(network, recipe, sites).network
    kinds = [type(changed.get_submodule(name)) for name in ("act1", "act2", "act3", "last")]
    assert kinds == [nn.SiLU, nn.ReLU, nn.ReLU, nn.SiLU]


def test_every_activation_of_yolox_is_in_its_stage(yolox: YoloX, base: nn.Module, sites: Sites) -> None:
    assert list(sites.activation) == ["stem", "dark2", "dark3", "dark4", "dark5", "neck", "head"]
    named = [name for site in sites.activation.values() for name in site.modules]
    assert sorted(named) == sorted(n for n, m in base.named_modules() if isinstance(m, nn.SiLU))
    for site in sites.activation.values():
        assert site.function == "silu"
        assert [name.removesuffix(".act") for name in site.modules] == [
            layer.removesuffix(".conv") for layer in site.layers
        ]


def test_a_network_without_costly_activations_has_no_sites() -> None:
    detector = ToyDetector()
    sites = find_sites(detector, detector.build())
    assert sites.activation == {}
    assert build_space(detector, sites, CPU, ("activate",)).parameters == {}


def test_the_polynomial_is_close_to_silu() -> None:
    """Against the figures in its docstring, by numerical integration."""
    x = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    ours, silu = PolynomialSiLU().eval()(x), nn.functional.silu(x)
    density = torch.exp(-(x**2) / 8)
    error = float((((ours - silu) ** 2 * density).sum() / density.sum()).sqrt())
    assert error == pytest.approx(0.0062, abs=1e-4)
    assert float((ours - silu).abs().max()) == pytest.approx(0.0365, abs=1e-4)
    assert float(PolynomialSiLU().eval()(torch.tensor(20.0))) == pytest.approx(20.0, abs=1e-4)
    assert float(PolynomialSiLU().eval()(torch.tensor(-20.0))) == pytest.approx(0.0, abs=1e-4)
    assert torch.equal(PolynomialSiLU().train()(x), silu)
    hard = nn.functional.hardswish(x)
    assert float((((hard - silu) ** 2 * density).sum() / density.sum()).sqrt()) > 11 * error


def test_a_polynomial_is_offered_where_the_target_fuses_it(yolox: YoloX, sites: Sites) -> None:
    for capabilities, wanted in (
        (CPU, ("silu", "polynomial", "hardswish", "relu")),
        (replace(CPU, fuses_elementwise=False), ("silu", "hardswish", "relu")),
    ):
        space = build_space(yolox, sites, capabilities, ("activate",))
        assert {parameter.values for parameter in space.parameters.values()} == {wanted}


def test_a_polynomial_is_written_without_exponentials(yolox: YoloX, base: nn.Module, sites: Sites) -> None:
    choices = tuple(Activate(site=name, function="polynomial") for name in sites.activation)
    network = apply(base, Recipe(detector="narrow", choices=choices), sites).network
    graph = export_graph(network, yolox, Postprocess(), [Category(k, str(k)) for k in range(3)])
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("Sigmoid") == 2  # objectness and classes, in decoding
    assert "Exp" not in kinds[: kinds.index("Sigmoid")]
    images = noise(yolox, 1)
    for ours, wanted in zip(outputs_of(network, images), outputs_of(base, images), strict=True):
        assert (ours - wanted).abs().max() < 0.1 * wanted.std()


def test_relu_stage_by_hand(yolox: YoloX, base: nn.Module, sites: Sites) -> None:
    recipe = Recipe(detector="narrow", choices=(Activate(site="head", function="relu"),))
    by_hand = copy.deepcopy(base)
    for module in by_hand.head.modules():
        if hasattr(module, "act"):
            module.act = nn.ReLU()
    images = noise(yolox, 1)
    changed = apply(base, recipe, sites)
    for ours, wanted in zip(outputs_of(changed.network, images), outputs_of(by_hand, images), strict=True):
        assert torch.equal(ours, wanted)
    assert changed.changed
    assert same_state(changed.network.state_dict(), base.state_dict())


def test_joint_with_pruning_rebuilt_bit_for_bit(
    yolox: YoloX, base: nn.Module, sites: Sites, tmp_path: Path
) -> None:
    first = next(iter(sites.channel))
    choices = (
        Activate(site="dark3", function="relu"),
        Activate(site="neck", function="hardswish"),
        Prune(site=first, sparsity=0.5),
    )
    recipe = Recipe(detector="narrow", choices=choices)
    draft = apply(base, recipe, sites)
    save(draft, recipe, tmp_path)
    again, rebuilt = rebuild(yolox.build().eval(), tmp_path)
    assert again == recipe
    assert rebuilt.activations == draft.activations
    images = noise(yolox, 2)
    for ours, wanted in zip(
        outputs_of(rebuilt.network, images), outputs_of(draft.network, images), strict=True
    ):
        assert torch.equal(ours, wanted)


def test_exported_as_relu(yolox: YoloX, base: nn.Module, sites: Sites) -> None:
    choices = tuple(Activate(site=name, function="relu") for name in sites.activation)
    network = apply(base, Recipe(detector="narrow", choices=choices), sites).network
    graph = export_graph(network, yolox, Postprocess(), [Category(k, str(k)) for k in range(3)])
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("Relu") == sum(len(site.modules) for site in sites.activation.values())
    assert kinds.count("Sigmoid") == 2  # objectness and classes, in decoding


def test_shown_by_name_and_priced(yolox: YoloX, sites: Sites) -> None:
    space = build_space(yolox, sites, CPU, ("prune", "quantize", "activate"), granularity="block")
    parameter = space.parameters["activation dark3"]
    assert parameter.values[0] == "silu"
    assert parameter.values[-1] == "relu"
    recipe = space.recipe({"activation dark3": "relu"})
    assert recipe.choices == (Activate(site="dark3", function="relu"),)
    assert space.params(recipe)["activation dark3"] == "relu"
    with pytest.raises(InputError, match=r"activation dark3: 'tanh': choose one of silu"):
        space.recipe({"activation dark3": "tanh"})
    table = SpaceTable(space)
    options = table.options([space.identity_params(), space.params(recipe)])
    shapes = table.shapes(options)
    assert shapes.costly[0].sum() == len([n for n in table.layers if "preds" not in n])
    gone = {n for n, a, b in zip(table.layers, shapes.costly[0], shapes.costly[1], strict=True) if a > b}
    assert gone == set(sites.activation["dark3"].layers)
    place = np.flatnonzero(options[1])
    step = table.neighbours(options[0], place, options[1][place])
    assert np.array_equal(step.costly[0], shapes.costly[1])
    back = table.neighbours(options[1], place, np.zeros(1, np.int64))
    assert back.costly[0] == pytest.approx(shapes.costly[0])
    smooth = table.shapes(table.options([space.identity_params() | {"activation dark3": "polynomial"}]))
    assert np.array_equal(smooth.costly[0], shapes.costly[1])
    assert {n for n, there in zip(table.layers, smooth.polynomial[0], strict=True) if there} == gone
    assert not shapes.polynomial.any()
    place = [list(space.parameters).index("activation dark3")]
    one = table.neighbours(options[0], np.array(place), np.array([1]))
    assert np.array_equal(one.polynomial, smooth.polynomial)
    milder = table.shapes(table.options([space.identity_params() | {"activation dark3": "hardswish"}]))
    assert milder.costly[0] == pytest.approx(shapes.costly[1] + 0.07 * np.isin(table.layers, list(gone)))
    price = np.zeros(features(table, shapes).shape[1])
    price[3] = 1.0  # of elements that go through a costly function at 32 bits
    whole, cheaper = LatencyModel(table, price, 0.0).of(shapes)
    written = shapes.outputs[0] * shapes.positions[0]
    saved = written[[table.layers.index(n) for n in gone]].sum() / written.sum()
    assert whole - cheaper == pytest.approx(saved)


def test_unknown_function_in_a_stored_plan_is_refused(base: nn.Module) -> None:
    with pytest.raises(InputError, match="choose from polynomial, hardswish, relu"):
        replace_activations(copy.deepcopy(base), {"head.stems.0.act": "tanh"})
