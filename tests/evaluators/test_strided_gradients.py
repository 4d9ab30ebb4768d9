"""Gradients that oneDNN leaves NaN where a strided convolution reads maps of one pixel."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from evaluators.folded_norms import FoldedNorms
from evaluators.strided_gradients import strided_weights, zero_garbage


def poison_scratch_memory() -> None:
    """Leave NaN where oneDNN keeps what it reorders."""
    for side, channels in ((14, 64), (7, 128), (28, 96)):
        layer = nn.Conv2d(channels, channels, 3, padding=1).bfloat16()
        images = torch.full((8, channels, side, side), float("nan"), dtype=torch.bfloat16)
        layer(images.contiguous(memory_format=torch.channels_last)).sum().backward()


def step(network: nn.Module, images: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        outputs = network(images)
    poison_scratch_memory()
    outputs.float().square().sum().backward()


def test_a_step_through_a_map_of_one_pixel_has_finite_gradients() -> None:
    """Where the CPU has the kernel, they are not without `zero_garbage`."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1))
    network = nn.Sequential(*layers).eval()
    plain = copy.deepcopy(network)
    images = torch.randn(8, 16, 1, 1).contiguous(memory_format=torch.channels_last)
    folded = FoldedNorms(network, images[:1], torch.bfloat16)
    for k in range(5):
        network.zero_grad()
        step(folded, images)  # type: ignore[arg-type]
        folded.hand_on()
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        assert len(gradients) == 5, k
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    plain(images).square().sum().backward()
    exact = next(iter(plain.parameters())).grad
    assert exact is not None
    torch.testing.assert_close(gradients[0], exact, rtol=0.1, atol=0.1 * float(exact.abs().max()))


def test_weights_of_strided_kernels_alone_are_cleaned() -> None:
    network = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 1, stride=2), nn.Conv2d(2, 2, 3, stride=2))
    assert [id(w) for w in strided_weights(network)] == [id(network[2].weight)]
    parametrize.register_parametrization(network[2], "weight", nn.Identity())
    [weight] = strided_weights(network)
    weight.grad = torch.full_like(weight, float("nan"))
    weight.grad[0, 0] = 3.0
    zero_garbage([weight])
    assert weight.grad[0, 0].eq(3.0).all()
    assert weight.grad.count_nonzero() == 9
