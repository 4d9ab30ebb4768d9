"""The YOLOX network against the published one, and its rewrites against itself."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_pruning
from torch import nn

from spaces.detectors.registry import DETECTORS, make_detector
from spaces.detectors.weights import load_weights
from spaces.detectors.yolox import YoloX
from spaces.detectors.yolox_network import SPPBottleneck
from spaces.errors import InputError

WEIGHTS = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "weights"
needs_weights = pytest.mark.skipif(not WEIGHTS.is_dir(), reason="the published weights are not at hand")


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """BatchNorm with statistics of its own, which a fresh network lacks."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.2, generator=generator)
    return network.eval()


def tiny(depthwise: bool = False) -> YoloX:
    return YoloX("tiny", 3, (64, 96), depth=0.33, width=0.125, depthwise=depthwise)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("yolox_nano", 0.91),
        ("yolox_tiny", 5.06),
        ("yolox_s", 9.0),
        ("yolox_m", 25.3),
        ("yolox_l", 54.2),
        ("yolox_x", 99.1),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, millions: float) -> None:
    with torch.device("meta"):
        network = make_detector(name, 80).build()
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.006)


@needs_weights
def test_published_weights_give_the_published_outputs() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    detector = make_detector("yolox_nano", 80)
    network = detector.build().eval()
    load_weights(network, WEIGHTS / "yolox_nano_bn_recalibrated.pth")
    images = torch.rand(1, 3, 416, 416, generator=torch.Generator().manual_seed(1)) * 255
    with torch.inference_mode():
        raw = torch.cat([level.flatten(2) for level in network(images)], dim=2)[0].T
    ours = torch.cat((raw[:, :4], raw[:, 4:].sigmoid()), dim=1).numpy()
    session = onnxruntime.InferenceSession(WEIGHTS / "yolox_nano.onnx")
    theirs = session.run(None, {"images": images.numpy()})[0][0]
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize("depthwise", [False, True])
def test_raw_outputs_are_the_same_kind_in_both_modes(depthwise: bool) -> None:
    network = tiny(depthwise).build()
    images = torch.zeros(2, 3, 64, 96)
    shapes = [(2, 8, 8, 12), (2, 8, 4, 6), (2, 8, 2, 3)]
    assert [tuple(level.shape) for level in network.train()(images)] == shapes
    assert [tuple(level.shape) for level in network.eval()(images)] == shapes


@pytest.mark.parametrize("depthwise", [False, True])
def test_simplified_is_exact_to_the_border(depthwise: bool) -> None:
    detector = tiny(depthwise)
    network = randomised(detector.build()).double()
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 255
    simple = detector.simplified(network)
    with torch.inference_mode():
        for level, other in zip(network(images), simple(images), strict=True):
            torch.testing.assert_close(other, level, rtol=1e-9, atol=1e-9)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in simple.modules())
    convolutions = {name for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    assert {name for name, m in simple.named_modules() if isinstance(m, nn.Conv2d)} == convolutions
    stem = simple.get_submodule("backbone.backbone.stem.conv.conv")
    assert (stem.in_channels, stem.kernel_size, stem.stride) == (3, (6, 6), (2, 2))
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules()), "the original changed"


def test_simplified_takes_pruned_and_factorised_networks() -> None:
    detector = tiny()
    network = randomised(detector.build())
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 255
    outputs = [network.get_submodule(name) for name in detector.output_layers(network)]
    before = sum(p.numel() for p in network.parameters())
    torch_pruning.pruner.MagnitudePruner(
        network,
        images,
        torch_pruning.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=outputs,
    ).step()
    assert sum(p.numel() for p in network.parameters()) < 0.4 * before
    block = network.get_submodule("head.cls_convs.0.0")
    wide = block.conv
    thin = nn.Conv2d(wide.in_channels, 2, 1, bias=False)
    block.conv = nn.Sequential(OrderedDict(first=thin, last=nn.Conv2d(2, wide.out_channels, 3, 1, 1)))
    network.double()
    with torch.inference_mode():
        for level, other in zip(
            network(images.double()), detector.simplified(network)(images.double()), strict=True
        ):
            torch.testing.assert_close(other, level, rtol=1e-9, atol=1e-9)


def test_chained_pools_are_the_wide_ones() -> None:
    module = SPPBottleneck(8, 8)
    module.conv1 = module.conv2 = nn.Identity()
    x = torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    wide = [nn.functional.max_pool2d(x, k, 1, k // 2) for k in (5, 9, 13)]
    torch.testing.assert_close(module(x), torch.cat([x, *wide], dim=1), rtol=0, atol=0)


def test_decode_by_hand() -> None:
    detector = tiny()
    outputs = tuple(torch.zeros(1, 8, 64 // s, 96 // s) for s in (8, 16, 32))
    outputs[1][0, :, 2, 3] = torch.tensor([0.5, 0.25, np.log(2.0), np.log(3.0), 0.0, 0.0, np.log(3.0), -50.0])
    boxes, scores = detector.decode(outputs)
    assert boxes.shape == (1, 96 + 24 + 6, 4)
    assert scores.shape == (1, 126, 3)
    # Stride 16, row 2, column 3: centre (3.5, 2.25) * 16 = (56, 36), size (32, 48).
    torch.testing.assert_close(boxes[0, 96 + 2 * 6 + 3], torch.tensor([40.0, 12.0, 72.0, 60.0]))
    torch.testing.assert_close(scores[0, 96 + 2 * 6 + 3], torch.tensor([0.25, 0.375, 0.0]))


def test_layers_have_blocks_and_stages() -> None:
    detector = tiny(depthwise=True)
    network = detector.build()
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    assert {detector.stage_of(name) for name in layers} == {
        "stem", "dark2", "dark3", "dark4", "dark5", "neck", "head"
    }  # fmt: skip
    blocks = {detector.block_of(name) for name in layers}
    assert {"stem", "dark3.0", "dark3.1", "C3_p4", "bu_conv1", "head.level0", "head.level2"} <= blocks
    assert len(blocks) == 1 + 2 + 2 + 2 + 3 + 8 + 3
    assert len(detector.output_layers(network)) == 9
    assert "head.obj_preds.2" in detector.output_layers(network)


@pytest.mark.parametrize("size", [(160, 150), (0, 160)])
def test_sizes_that_do_not_fit_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="multiples of 32"):
        make_detector("yolox_nano", 80, size)


def test_registry_names_what_it_knows() -> None:
    with pytest.raises(InputError, match=r"yolox_nano.*package\.module:Class"):
        make_detector("yolox_nan", 80)
    with pytest.raises(InputError, match="cannot be imported"):
        make_detector("no.such.module:Class", 80)
    assert all(make_detector(name, 2).name == name for name in DETECTORS)


def test_registry_imports_a_users_class() -> None:
    name = f"{__name__}:OwnYoloX"
    detector = make_detector(name, 4, (64, 64))
    assert isinstance(detector, OwnYoloX)
    assert (detector.name, detector.num_classes, detector.preprocess.size) == (name, 4, (64, 64))
    with pytest.raises(InputError, match="is no Detector; it lacks name"):
        make_detector("builtins:dict", 4)


class OwnYoloX(YoloX):
    """A detector of a user."""

    def __init__(self, name: str, num_classes: int, size: tuple[int, int] = (96, 96)) -> None:
        super().__init__(name, num_classes, size, depth=0.33, width=0.125)
