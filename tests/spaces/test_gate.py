"""Constant gates: which blocks gate, what replaces them, and that the next convolution takes it in."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from spaces.apply import apply, check, rebuild, same_state, save
from spaces.capabilities import Capabilities
from spaces.detectors.base import Detector
from spaces.detectors.folding import folded
from spaces.detectors.ssd import SsdLite
from spaces.detectors.yolox import YoloX
from spaces.effects import bits_by_layer, layers_gone, total_macs, widths_by_layer
from spaces.errors import InputError
from spaces.gates import ConstantGate, gates_of
from spaces.layers import count_macs
from spaces.methods.base import Method
from spaces.methods.gate import ConstantGates
from spaces.methods.testing import MethodContract
from spaces.recipe import Drop, Gate, Prune, Quantize, Recipe
from spaces.sites import Sites, find_sites
from spaces.space import build_space
from spaces.table import SpaceTable
from spaces.testing import lively_network, noise, outputs_of

CPU = Capabilities(bit_widths=(32, 16, 8), channel_granule=8)
FIRST = "backbone.features.0.4.block.2"
"""The first of MobileNetV3-large's eight blocks, of 72 channels in the full network."""


@cache
def base() -> tuple[SsdLite, nn.Module, Sites]:
    """Not to be changed."""
    detector = SsdLite("small", 3, (96, 96))
    network = lively_network(detector)
    return detector, network, find_sites(detector, network)


class TestConstantGates(MethodContract):
    @pytest.fixture
    def method(self) -> Method:
        return ConstantGates()

    @pytest.fixture
    def detector(self) -> Detector:
        return base()[0]


def of(*choices: Gate | Prune | Quantize | Drop) -> Recipe:
    return Recipe(detector="small", choices=choices)


def test_blocks_that_gate_are_found_by_what_they_do() -> None:
    _, network, sites = base()
    wanted = [name for name, m in network.named_modules() if isinstance(m, SqueezeExcitation)]
    assert list(sites.gate) == wanted
    assert len(wanted) == 8
    assert sites.gate[FIRST].layers == (f"{FIRST}.fc1", f"{FIRST}.fc2")
    plain = YoloX("narrow", 3, (64, 64), depth=0.33, width=0.125)
    assert not find_sites(plain, plain.build()).gate


def test_gates_by_hand() -> None:
    read = torch.randn(2, 3, 4, 5)
    gates = torch.tensor([[0.5, 0.0, 2.0], [1.0, 3.0, -1.0]])
    found = gates_of(read, read * gates[:, :, None, None])
    assert found is not None
    torch.testing.assert_close(found, gates)
    assert gates_of(read, read + 1.0) is None
    assert gates_of(read, read.flip(1)) is None
    assert gates_of(read[:, :, :1, :2], read[:, :, :1, :2]) is None, "too few positions"
    silent = read.clone()
    silent[:, 1] = 0.0
    found = gates_of(silent, silent * 0.5)
    assert found is not None
    assert found.tolist() == [[0.5, 1.0, 0.5]] * 2


def test_gates_begin_at_their_means_and_without_data_at_rest() -> None:
    _, network, sites = base()
    means = torch.rand(72)
    draft = apply(network, of(Gate(site=FIRST)), sites, {FIRST: means})
    gate = draft.network.get_submodule(FIRST)
    assert isinstance(gate, ConstantGate)
    torch.testing.assert_close(gate.gates.detach(), means)
    assert draft.gates == {FIRST: 72}
    assert draft.changed
    bare = apply(network, of(Gate(site=FIRST)), sites).network.get_submodule(FIRST)
    block = network.get_submodule(FIRST)
    assert isinstance(block, SqueezeExcitation)
    assert isinstance(bare, ConstantGate)
    with torch.no_grad():
        at_zero = block.scale_activation(block.fc2(block.activation(block.fc1(torch.zeros(1, 72, 1, 1)))))
    torch.testing.assert_close(bare.gates.detach(), at_zero.flatten(), rtol=1e-2, atol=1e-2)


def test_a_pruned_block_keeps_the_gates_of_its_channels() -> None:
    _, network, sites = base()
    site = next(
        s
        for s in sites.channel.values()
        if any(m.layer == f"{FIRST}.fc2" and m.side == "out" for m in s.members)
    )
    means = torch.arange(72.0)
    draft = apply(network, of(Gate(site=FIRST), Prune(site=site.name, sparsity=0.5)), sites, {FIRST: means})
    gate = draft.network.get_submodule(FIRST)
    assert isinstance(gate, ConstantGate)
    before = draft.network.get_submodule("backbone.features.0.4.block.1.0")
    assert isinstance(before, nn.Conv2d)
    assert len(gate.gates) == before.out_channels < 72
    whole = apply(network, of(Prune(site=site.name, sparsity=0.5)), sites)
    kept = whole.channels[f"{FIRST}.fc2"].out
    assert kept is not None
    assert gate.gates.tolist() == [float(k) for k in kept]
    outputs = outputs_of(draft.network, noise(base()[0], 1))
    assert all(bool(torch.isfinite(o).all()) for o in outputs)


def test_the_next_convolution_takes_constant_gates_in_exactly() -> None:
    detector, network, sites = base()
    random = torch.Generator().manual_seed(0)
    statistics = {
        name: torch.rand(sites.facts[gate.layers[-1]].outputs, generator=random)
        for name, gate in sites.gate.items()
    }
    draft = apply(network, of(*(Gate(site=name) for name in sites.gate)), sites, statistics)
    simple, images = folded(draft.network), noise(detector, 2)
    assert not any(isinstance(m, ConstantGate | nn.BatchNorm2d) for m in simple.modules())
    for ours, plain in zip(outputs_of(simple, images), outputs_of(draft.network, images), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=2e-3)
    assert any(isinstance(m, ConstantGate) for m in draft.network.modules()), "a copy was folded"


def test_a_gate_that_nothing_can_take_in_stays() -> None:
    grouped = nn.Sequential(ConstantGate(torch.rand(4)), nn.Conv2d(4, 4, 1, groups=2))
    assert isinstance(folded(grouped)[0], ConstantGate)  # type: ignore[index]

    class Backwards(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](self[1](x))  # type: ignore[no-any-return]

    backwards, x = Backwards(ConstantGate(torch.rand(4)), nn.Conv2d(4, 4, 1)), torch.rand(1, 4, 2, 2)
    torch.testing.assert_close(folded(backwards)(x), backwards(x))


def test_a_stored_network_is_rebuilt_bit_for_bit(tmp_path: Path) -> None:
    detector, network, sites = base()
    recipe = of(
        *(Gate(site=name) for name in list(sites.gate)[::2]),
        *(Prune(site=name, sparsity=0.25) for name in list(sites.channel)[3:9]),
        *(Quantize(site=name, weight_bits=16, activation_bits=16) for name in sites.layer),
    )
    draft = apply(network, recipe, sites)
    save(draft, recipe, tmp_path)
    again, rebuilt = rebuild(detector.build(), tmp_path)
    assert again == recipe
    assert rebuilt.gates == draft.gates
    assert rebuilt.channels == draft.channels
    assert same_state(rebuilt.network.state_dict(), draft.network.state_dict())
    images: Tensor = noise(detector, 1)
    for ours, stored in zip(
        outputs_of(rebuilt.network.eval(), images), outputs_of(draft.network, images), strict=True
    ):
        assert torch.equal(ours, stored)


def test_what_computed_gates_is_gone_everywhere() -> None:
    detector, network, sites = base()
    recipe = of(Gate(site=FIRST))
    assert layers_gone(recipe, sites) == set(sites.gate[FIRST].layers)
    assert f"{FIRST}.fc1" not in bits_by_layer(recipe, sites)
    assert widths_by_layer(recipe, sites)[f"{FIRST}.fc1"] == (0, 0)
    applied = apply(network, recipe, sites).network
    assert total_macs(recipe, sites) == count_macs(applied, detector.preprocess.size)
    space = build_space(detector, sites, CPU, ("prune", "gate", "drop"))
    table = SpaceTable(space)
    params = space.identity_params() | {f"gate {FIRST}": "constant"}
    assert space.recipe(params) == recipe
    shapes = table.shapes(table.options([space.identity_params(), params]))
    at = [table.layers.index(layer) for layer in sites.gate[FIRST].layers]
    assert (shapes.outputs[0, at] > 0).all()
    assert not shapes.outputs[1, at].any()
    assert float(shapes.macs[1].sum()) == total_macs(recipe, sites)
    np.testing.assert_array_equal(
        np.delete(shapes.outputs[0], at), np.delete(shapes.outputs[1], at), "all others stay"
    )


def test_a_dropped_block_takes_its_gate_with_it(tmp_path: Path) -> None:
    detector, network, sites = base()
    block = next(name for name in sites.residual if any(gate.startswith(f"{name}.") for gate in sites.gate))
    inside = next(gate for gate in sites.gate if gate.startswith(f"{block}."))
    recipe = of(Gate(site=inside), Drop(site=block))
    draft = apply(network, recipe, sites)
    assert not any(name.startswith(f"{block}.") for name, _ in draft.network.named_modules())
    save(draft, recipe, tmp_path)
    _, rebuilt = rebuild(detector.build(), tmp_path)
    assert same_state(rebuilt.network.state_dict(), draft.network.state_dict())
    assert total_macs(recipe, sites) == total_macs(of(Drop(site=block)), sites)


def test_an_unknown_block_is_refused() -> None:
    with pytest.raises(InputError, match="no squeeze-and-excitation block"):
        check(of(Gate(site="backbone")), base()[2])
