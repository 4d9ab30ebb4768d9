"""Removal of residual blocks: where they are found, and that nothing else notices."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig
from torchvision.models.resnet import BasicBlock, ResNet

from evaluators.export import export_graph
from spaces.apply import apply, rebuild, same_state, save
from spaces.capabilities import Capabilities
from spaces.detectors.base import Category, Outputs, Postprocess
from spaces.detectors.yolox import YoloX
from spaces.effects import bits_by_layer, total_macs, widths_by_layer
from spaces.errors import InputError
from spaces.recipe import Activate, Drop, Prune, Quantize, Recipe
from spaces.sites import Sites, find_sites
from spaces.space import build_space
from spaces.table import SpaceTable
from spaces.testing import lively_network, noise, outputs_of
from tests.spaces.toy import ToyDetector

CPU = Capabilities(bit_widths=(32, 16), channel_granule=8)
DARK3 = "backbone.backbone.dark3.1.m"


class TorchvisionNetwork(nn.Module):
    """Blocks of torchvision: residual ones, with a stride, with squeeze-excite, one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        trunk = ResNet(BasicBlock, [2, 2, 1, 1])
        self.stem = nn.Sequential(trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool)
        self.layer1, self.layer2 = trunk.layer1, trunk.layer2

        def mobile(channels: int, stride: int, use_se: bool) -> nn.Module:
            settings = InvertedResidualConfig(128, 3, 64, channels, use_se, "HS", stride, 1, 1.0)
            return InvertedResidual(settings, nn.BatchNorm2d)

        self.mobile = nn.Sequential(mobile(128, 1, True), mobile(128, 1, False), mobile(128, 2, True))
        self.twice = mobile(128, 1, False)
        self.out = nn.Conv2d(128, 4, 1)

    def forward(self, images: Tensor) -> Outputs:
        x = self.mobile(self.layer2(self.layer1(self.stem(images))))
        return (self.out(self.twice(self.twice(x))),)


class TorchvisionDetector(ToyDetector):
    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return TorchvisionNetwork()


@pytest.fixture(scope="module")
def yolox() -> YoloX:
    return YoloX("narrow", 3, (64, 64), depth=0.33, width=0.125)


@pytest.fixture(scope="module")
def base(yolox: YoloX) -> nn.Module:
    return lively_network(yolox)


@pytest.fixture(scope="module")
def sites(yolox: YoloX, base: nn.Module) -> Sites:
    return find_sites(yolox, base)


def test_bottlenecks_with_a_shortcut_are_the_sites_of_yolox(base: nn.Module, sites: Sites) -> None:
    shortcuts = [n for n, m in base.named_modules() if getattr(m, "shortcut", False)]
    assert list(sites.residual) == shortcuts
    assert shortcuts == [
        f"backbone.backbone.dark{k}.1.m.{i}" for k, n in ((2, 1), (3, 3), (4, 3)) for i in range(n)
    ]
    assert sites.residual[f"{DARK3}.1"].layers == (f"{DARK3}.1.conv1.conv", f"{DARK3}.1.conv2.conv")


def test_residual_blocks_of_torchvision() -> None:
    detector = TorchvisionDetector()
    sites = find_sites(detector, detector.build())
    assert list(sites.residual) == ["layer1.0", "layer1.1", "layer2.1", "mobile.0", "mobile.1"]


def test_a_dropped_block_is_the_identity(yolox: YoloX, base: nn.Module, sites: Sites) -> None:
    by_hand = copy.deepcopy(base)
    by_hand.backbone.backbone.dark3[1].m[1].forward = lambda x: x
    draft = apply(base, Recipe(detector="narrow", choices=(Drop(site=f"{DARK3}.1"),)), sites)
    images = noise(yolox, 1)
    for ours, wanted in zip(outputs_of(draft.network, images), outputs_of(by_hand, images), strict=True):
        assert torch.equal(ours, wanted)
    assert draft.changed
    assert not any(name.startswith(f"{DARK3}.1") for name in draft.network.state_dict())


def joint(sites: Sites) -> Recipe:
    """All methods on the same blocks: everything pruned to a half, two blocks dropped, 16 bits everywhere."""
    return Recipe(
        detector="narrow",
        choices=(
            *(Prune(site=name, sparsity=0.5) for name in sites.channel),
            *(Quantize(site=name, weight_bits=16, activation_bits=16) for name in sites.layer),
            Activate(site="dark3", function="relu"),
            Drop(site=f"{DARK3}.0"),
            Drop(site=f"{DARK3}.2"),
        ),
    )


def test_joint_with_everything_else_rebuilt_bit_for_bit(
    yolox: YoloX, base: nn.Module, sites: Sites, tmp_path: Path
) -> None:
    recipe = joint(sites)
    draft = apply(base, recipe, sites)
    save(draft, recipe, tmp_path)
    again, rebuilt = rebuild(yolox.build().eval(), tmp_path)
    assert again == recipe
    assert rebuilt.dropped == draft.dropped == (f"{DARK3}.0", f"{DARK3}.2")
    assert same_state(rebuilt.network.state_dict(), draft.network.state_dict())
    images = noise(yolox, 2)
    for ours, wanted in zip(
        outputs_of(rebuilt.network, images), outputs_of(draft.network, images), strict=True
    ):
        assert torch.equal(ours, wanted)
    gone = {layer for name in draft.dropped for layer in sites.residual[name].layers}
    assert set(draft.bits) == set(bits_by_layer(recipe, sites)) == set(sites.facts) - gone
    widths = widths_by_layer(recipe, sites)
    for name, module in draft.network.named_modules():
        if isinstance(module, nn.Conv2d):
            assert widths.pop(name) == (module.in_channels, module.out_channels)
    assert widths == dict.fromkeys(gone, (0, 0))


def test_export_leaves_no_trace(yolox: YoloX, base: nn.Module, sites: Sites) -> None:
    categories = [Category(k, str(k)) for k in range(3)]
    graphs = [
        export_graph(network, yolox, Postprocess(), categories)
        for network in (base, apply(base, joint(sites), sites).network)
    ]
    counts = [[node.op_type for node in graph.graph.node].count("Conv") for graph in graphs]
    assert counts[0] - counts[1] == 4
    assert not any(f"{DARK3}.0" in node.name for node in graphs[1].graph.node)


def test_the_table_agrees_with_the_slow_way(yolox: YoloX, sites: Sites) -> None:
    space = build_space(yolox, sites, CPU, ("prune", "quantize", "activate", "drop"), granularity="stage")
    assert space.parameters[f"block {DARK3}.0"].values == ("kept", "dropped")
    table = SpaceTable(space)
    random = np.random.default_rng(0)
    options = np.stack([random.integers(0, table.sizes) for _ in range(20)])
    shapes = table.shapes(options)
    for row in range(len(options)):
        recipe = space.recipe(table.params(options[row]))
        assert space.recipe(space.params(recipe)) == recipe
        widths = widths_by_layer(recipe, sites)
        assert shapes.inputs[row].tolist() == [widths[name][0] for name in table.layers]
        assert shapes.outputs[row].tolist() == [widths[name][1] for name in table.layers]
        assert shapes.macs[row].sum() == total_macs(recipe, sites)
    changed = random.integers(0, len(table.names), 60)
    to = np.array([random.integers(table.sizes[p]) for p in changed])
    rows = np.repeat(options[:1], 60, axis=0)
    rows[np.arange(60), changed] = to
    fast, slow = table.neighbours(options[0], changed, to), table.shapes(rows)
    for name in ("inputs", "outputs", "macs", "bits", "costly"):
        np.testing.assert_allclose(getattr(fast, name), getattr(slow, name))


def test_other_modules_are_refused(base: nn.Module, sites: Sites) -> None:
    recipe = Recipe(detector="narrow", choices=(Drop(site="backbone.C3_p4.m.0"),))
    with pytest.raises(InputError, match=r"C3_p4\.m\.0': is no residual block"):
        apply(base, recipe, sites)
