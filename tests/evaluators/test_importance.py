"""Taylor scores against their definition: the slope of the loss at gates behind the norms."""

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evaluators.datasets.letterbox import LetterboxedImages
from evaluators.importance import batchnorm_scores, taylor_scores
from evaluators.quiet import QuietSlot
from evaluators.teacher import batch_of
from spaces.apply import same_state
from spaces.detectors.base import Detector, Labels, Outputs
from spaces.detectors.yolox import YoloX
from spaces.testing import lively_network

STEM = "backbone.backbone.stem.conv.bn"


class SmoothYoloX(YoloX):
    """With a loss that has a slope everywhere: SimOTA's assignment jumps, so differences tell nothing."""

    def loss(self, outputs: Outputs, labels: Sequence[Labels]) -> Tensor:
        return torch.stack([level.square().mean() for level in outputs]).sum()


SMOOTH = SmoothYoloX("narrow", 10, (96, 96), depth=0.33, width=0.125)


def loss_behind_gates(network: nn.Module, norm: str, gates: Tensor, images: Tensor) -> float:
    """The loss where each channel that a norm produces is multiplied by a gate."""
    handle = network.get_submodule(norm).register_forward_hook(
        lambda _, __, output: output * gates.view(1, -1, 1, 1)
    )
    with torch.no_grad():
        loss = SMOOTH.loss(network(images), [])
    handle.remove()
    return float(loss)


def test_scales_of_norms_are_importance_too() -> None:
    network = lively_network(SMOOTH)
    norm = network.get_submodule(STEM)
    norm.weight.data[:2] = torch.tensor([-3.0, 0.5])
    scores = batchnorm_scores(network)
    assert scores[STEM][:2].tolist() == [3.0, 0.5]
    norms = {name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert set(scores) == norms


@pytest.mark.parametrize("norm", [STEM, "head.stems.1.bn"])
def test_scores_are_squared_slopes_at_gates(
    norm: str, fit_images: LetterboxedImages, slot: QuietSlot
) -> None:
    network = lively_network(SMOOTH)
    scores = taylor_scores(network, SMOOTH, fit_images, slot, batches=2, batch_size=3)[norm]
    assert scores.shape == (network.get_submodule(norm).num_features,)
    double, step = copy.deepcopy(network).double(), 1e-5
    for channel in (0, 1):
        gates = torch.ones(len(scores), dtype=torch.float64)
        expected = 0.0
        for first in (0, 3):  # two batches of three images: slopes are squared before they are summed
            images = batch_of(fit_images, SMOOTH, np.arange(first, first + 3), False).double()
            gates[channel] = 1 + step
            above = loss_behind_gates(double, norm, gates, images)
            gates[channel] = 1 - step
            below = loss_behind_gates(double, norm, gates, images)
            gates[channel] = 1
            expected += ((above - below) / (2 * step)) ** 2
        assert float(scores[channel]) == pytest.approx(expected, rel=5e-3)


def test_dead_channels_score_0_and_the_base_is_left_alone(
    digits_base: nn.Module, digits_detector: Detector, fit_images: LetterboxedImages, slot: QuietSlot
) -> None:
    network = copy.deepcopy(digits_base)
    stem = network.get_submodule(STEM)
    stem.weight[2] = stem.bias[2] = 0.0
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    scores = taylor_scores(network, digits_detector, fit_images, slot, batches=1, batch_size=4)
    assert [k for k, score in enumerate(scores[STEM].tolist()) if score == 0] == [2]
    assert all(bool(torch.isfinite(s).all()) and float(s.sum()) > 0 for s in scores.values())
    norms = {name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert scores.keys() == norms
    assert same_state(network.state_dict(), before)
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())


class NoShift(nn.Module):
    """A norm without shift; torch below 2.14 makes none, but a user may take its shift away."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.out = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 15, 1)
        self.norm.register_parameter("bias", None)

    def forward(self, images: Tensor) -> Outputs:
        return (self.out(self.norm(self.a(images))),)


def test_a_norm_without_shift_is_scored_by_its_scale(fit_images: LetterboxedImages, slot: QuietSlot) -> None:
    torch.manual_seed(0)
    network = NoShift().eval()
    network.norm.weight.data[3] = 0.0
    scores = taylor_scores(network, SMOOTH, fit_images, slot, batches=1, batch_size=2)["norm"]
    assert [k for k, score in enumerate(scores.tolist()) if score == 0] == [3]


def test_a_network_without_norms_has_no_scores(fit_images: LetterboxedImages, slot: QuietSlot) -> None:
    """Its channels are judged by magnitude then."""
    network = nn.Conv2d(3, 4, 1)
    assert taylor_scores(network, SMOOTH, fit_images, slot, batches=1, batch_size=2) == {}
    assert not any(p.grad is not None for p in network.parameters())
