"""What the contract test brings with it works on networks of all kinds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spaces.detectors.base import Outputs
from spaces.testing import lively_network, noise, outputs_of
from tests.spaces.toy import ToyDetector


class Bare(nn.Module):
    """Norms without scale or shift, and an output layer over positions."""

    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.a, self.norm, self.out = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16, affine=affine), nn.Linear(16, 4)
        if affine:
            self.norm.register_parameter("bias", None)

    def forward(self, images: Tensor) -> Outputs:
        return (self.out(self.norm(self.a(images)).relu().flatten(2).transpose(1, 2)),)


@pytest.mark.parametrize("affine", [True, False])
def test_a_lively_network_has_output_channels_that_spread_by_1(affine: bool) -> None:
    class Detector(ToyDetector):
        def build(self) -> nn.Module:
            return Bare(affine)

    detector = Detector()
    rows = outputs_of(lively_network(detector), noise(detector, 8))[0]
    assert rows.shape == (8, 256, 4)
    torch.testing.assert_close(rows.flatten(0, 1).std(dim=0), torch.ones(4), rtol=1e-3, atol=1e-3)
