"""One training step in bfloat16 of every family, beside float32: reading undefined memory would show."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from evaluators.folded_norms import FoldedNorms
from spaces.detectors.registry import make_detector
from spaces.testing import lively_network, noise
from tests.evaluators.test_blind_taps import poison_scratch_memory

FAMILIES = {
    "yolox_digits": 96,
    "yolox_nano": 96,
    "ssdlite320_mobilenet_v3_large": 96,
    "ssd300_vgg16": 96,
    "fasterrcnn_digits": 96,
    "retinanet_resnet18_fpn": 64,  # its coarsest level is one pixel
    "fcos_resnet18_fpn": 64,
}


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("value", [float("nan"), 1e30])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_gradient_is_far_from_that_of_float32(name: str, value: float) -> None:
    detector = make_detector(name, 3, (FAMILIES[name],) * 2)
    network, teacher = lively_network(detector), lively_network(detector, seed=1)
    network.requires_grad_(True)
    images = noise(detector, 2).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        wanted = teacher(images)
    detector.distillation(network(images), wanted).backward()  # type: ignore[no-untyped-call]
    exact = gradients(network)
    network.zero_grad(set_to_none=True)
    folded = FoldedNorms(network, images[:1], torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = folded(images)
    loss = detector.distillation(tuple(output.float() for output in outputs), wanted)
    poison_scratch_memory(value)
    loss.backward()  # type: ignore[no-untyped-call]
    folded.hand_on()
    found = gradients(network)
    assert found.keys() == exact.keys()
    whole = max(float(gradient.abs().max()) for gradient in exact.values())
    for layer, gradient in found.items():
        assert bool(torch.isfinite(gradient).all()), layer
        assert float(gradient.abs().max()) < 3 * float(exact[layer].abs().max()) + 0.1 * whole, layer
