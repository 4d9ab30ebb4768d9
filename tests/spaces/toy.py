"""A small network with everything that makes channels depend on each other, and a detector around it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spaces.detectors.base import Labels, Outputs, Preprocess


def block(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class ToyNetwork(nn.Module):
    """A residual sum, a concatenation, a depthwise convolution and an output layer of 4 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.left = block(16, 16)
        self.right = block(16, 24, kernel=1)
        self.thin = block(40, 40, groups=40)
        self.wide = block(40, 32, kernel=1)
        self.out = nn.Conv2d(32, 4, 1)

    def forward(self, images: Tensor) -> Outputs:
        x = self.stem(images)
        x = x + self.left(x)
        x = torch.cat((x, self.right(x)), dim=1)
        return (self.out(self.wide(self.thin(x))),)


class ToyDetector:
    """As much of the Detector protocol as `spaces` looks at."""

    name, num_classes = "toy", 1
    preprocess = Preprocess(size=(16, 16))

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        network = ToyNetwork()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):  # as after training: every channel differs
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        return network

    def output_layers(self, network: nn.Module) -> frozenset[str]:
        return frozenset({"out"})

    def block_of(self, layer: str) -> str:
        return layer.split(".")[0]

    def stage_of(self, layer: str) -> str:
        return "body" if layer != "out" else "head"

    def loss(self, outputs: Outputs, labels: Sequence[Labels]) -> Tensor:
        return outputs[0].square().mean()

    def distillation(self, outputs: Outputs, teacher: Outputs) -> Tensor:
        return (outputs[0] - teacher[0]).square().mean()

    def decode(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        flat = outputs[0].flatten(2).transpose(1, 2)
        return flat, flat[..., :1].sigmoid()

    def simplified(self, network: nn.Module) -> nn.Module:
        return network.eval()
