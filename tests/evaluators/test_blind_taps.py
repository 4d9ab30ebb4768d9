"""Gradients that oneDNN leaves undefined where a strided convolution reads maps of one pixel."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from evaluators.blind_taps import BlindTaps
from evaluators.folded_norms import FoldedNorms

POINT = torch.zeros(1, 2, 1, 1)


def poison_scratch_memory(value: float) -> None:
    """Leave a value where oneDNN keeps what it reorders."""
    for side, channels in ((14, 64), (7, 128), (28, 96)):
        layer = nn.Conv2d(channels, channels, 3, padding=1).bfloat16()
        images = torch.full((8, channels, side, side), value, dtype=torch.bfloat16)
        layer(images.contiguous(memory_format=torch.channels_last)).sum().backward()


def test_a_step_through_a_map_of_one_pixel_has_the_gradients_of_float32() -> None:
    """Where the CPU has the kernel, they are anything without `BlindTaps`."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1))
    network = nn.Sequential(*layers).eval()
    plain = copy.deepcopy(network)
    images = torch.randn(8, 16, 1, 1).contiguous(memory_format=torch.channels_last)
    plain(images).square().sum().backward()
    exact = next(iter(plain.parameters())).grad
    assert exact is not None
    folded = FoldedNorms(network, images[:1], torch.bfloat16)
    for value in (float("nan"), 1e30, -7.0):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = folded(images)
        poison_scratch_memory(value)
        outputs.float().square().sum().backward()  # type: ignore[attr-defined]
        folded.hand_on()
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        assert len(gradients) == 5
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        assert gradients[0].count_nonzero() == 16 * 16
        torch.testing.assert_close(gradients[0], exact, rtol=0.1, atol=0.1 * float(exact.abs().max()))


def taps(size: tuple[int, int], **layer: int) -> list[list[int]]:
    """1 for the blind taps of a convolution on a map of this size."""
    convolution = nn.Conv2d(2, 2, 3, stride=2, **layer)  # type: ignore[arg-type]
    found = BlindTaps(convolution, torch.zeros(1, 2, *size)).of
    return found[convolution].int().tolist() if found else []


def test_blind_taps_by_hand() -> None:
    assert taps((1, 1), padding=1) == [[1, 1, 1], [1, 0, 1], [1, 1, 1]]
    assert taps((2, 1), padding=1) == [[1, 1, 1], [1, 0, 1], [1, 0, 1]]  # one output, at -1, 0 and 1
    assert taps((3, 3), padding=1) == []  # outputs at -1 and 1
    assert taps((4, 4), padding=0) == []
    assert taps((1, 3), padding=2, dilation=2) == [[1, 1, 1], [0, 0, 0], [1, 1, 1]]  # -2, 0, 2 and 0, 2, 4


def test_numbers_elsewhere_stay_and_the_network_too() -> None:
    network = nn.Sequential(nn.Conv2d(2, 2, 3, stride=2, padding=1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))
    parametrize.register_parametrization(network[0], "weight", nn.Identity())
    blind = BlindTaps(network, POINT)
    assert all(module.training for module in network.modules())
    assert isinstance(network[1], nn.BatchNorm2d)
    assert int(network[1].num_batches_tracked or 0) == 0, "nothing was learnt from the image"
    weights = [p for p in network.parameters() if p.dim() == 4]
    assert len(weights) == 2
    for weight in weights:
        weight.grad = torch.full_like(weight, 3.0)
    blind.clear()
    gradients: list[Tensor] = [w.grad for w in weights if w.grad is not None]
    assert sorted(int(g.count_nonzero()) for g in gradients) == [4, 4]
    assert all(bool(((g == 0) | (g == 3)).all()) for g in gradients)
