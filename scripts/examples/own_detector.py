"""A detector of one's own: one level of features, no anchors, a few plain convolutions.

It is none of the shipped families, and all that Paredown has to know about it is the class at the end:
the protocol of `spaces.detectors.base`, in the spirit of FCOS (Tian et al. 2019, arXiv 1904.01355). From the
top folder of the repository:

    paredown train scripts/examples/own_detector_training.yaml --output runs/own_detector.safetensors
    paredown search scripts/examples/own_detector.yaml
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from spaces.detectors.base import Labels, Outputs, Preprocess
from spaces.detectors.folding import folded
from spaces.errors import InputError

STRIDE = 8
REACH = 1.5
"""Cells whose centre is within so many strides of a box's centre learn to find that box."""


def layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class OwnNetwork(nn.Module):
    """`(N, 3, H, W)` to class logits `(N, C, H / 8, W / 8)` and log distances to the sides, 4 channels."""

    def __init__(self, num_classes: int, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        steps = zip((3, *widths), widths, strict=False)
        self.body = nn.Sequential(
            *(nn.Sequential(layer(i, o, stride=2), layer(o, o), layer(o, o)) for i, o in steps)
        )
        self.tower = nn.Sequential(layer(widths[-1], widths[-1]), layer(widths[-1], widths[-1]))
        self.classes = nn.Conv2d(widths[-1], num_classes, 1)
        self.sides = nn.Conv2d(widths[-1], 4, 1)
        nn.init.constant_(self.classes.bias, -math.log(99))  # scores start at 1 %

    def forward(self, images: Tensor) -> Outputs:
        x = self.tower(self.body(images))
        return self.classes(x), self.sides(x)


class OwnDetector:
    """What Paredown asks of a detector; see `spaces.detectors.base.Detector` for each method's contract."""

    def __init__(self, name: str, num_classes: int, size: tuple[int, int] = (160, 160)) -> None:
        if any(side % STRIDE for side in size):
            raise InputError("size", tuple(size), f"height and width must be multiples of {STRIDE}")
        self.name, self.num_classes = name, num_classes
        self.preprocess = Preprocess(size=size, scale=1 / 255, mean=(0.45,) * 3, std=(0.25,) * 3)
        y, x = torch.meshgrid(*(torch.arange(side // STRIDE) for side in size), indexing="ij")
        self._centres = (torch.stack((x, y), dim=2).flatten(0, 1) + 0.5) * STRIDE  # (A, 2), pixels

    def build(self) -> nn.Module:
        return OwnNetwork(self.num_classes)

    def output_layers(self, network: nn.Module) -> frozenset[str]:
        return frozenset({"classes", "sides"})

    def block_of(self, layer: str) -> str:
        return ".".join(layer.split(".")[:2])  # body.0, body.1, body.2, tower.0 ...

    def stage_of(self, layer: str) -> str:
        return "body" if layer.startswith("body") else "head"

    def loss(self, outputs: Outputs, labels: Sequence[Labels]) -> Tensor:
        logits, boxes = self._flat(outputs)
        targets = [self._targets(one) for one in labels]
        classes, wanted = (torch.stack(parts) for parts in zip(*targets, strict=True))
        positive = classes < self.num_classes
        found = positive.sum().clamp(min=1)
        hot = F.one_hot(classes, self.num_classes + 1)[..., :-1].to(logits)
        focal = sigmoid_focal_loss(logits, hot, reduction="sum")
        return (focal + generalized_box_iou_loss(boxes[positive], wanted[positive], reduction="sum")) / found

    def distillation(self, outputs: Outputs, teacher: Outputs) -> Tensor:
        sure = teacher[0].sigmoid()
        entropy = F.binary_cross_entropy_with_logits(teacher[0], sure, reduction="sum")
        classes = F.binary_cross_entropy_with_logits(outputs[0], sure, reduction="sum") - entropy
        weight = sure.amax(dim=1, keepdim=True)
        return (classes + (weight * (outputs[1] - teacher[1]).abs()).sum()) / weight.sum().clamp(min=1)

    def decode(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        logits, boxes = self._flat(outputs)
        return boxes, logits.sigmoid()

    def simplified(self, network: nn.Module) -> nn.Module:
        return folded(network)

    def _flat(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Class logits `(N, A, C)` and boxes `(N, A, 4)` xyxy, pixels."""
        logits, sides = (output.flatten(2).transpose(1, 2) for output in outputs)
        reach = sides.clamp(max=6).exp() * STRIDE
        centres = self._centres.to(reach)
        return logits, torch.cat((centres - reach[..., :2], centres + reach[..., 2:]), dim=2)

    def _targets(self, labels: Labels) -> tuple[Tensor, Tensor]:
        """Class `(A,)` (C: none) and box `(A, 4)` of each cell; the smallest of several boxes has it."""
        boxes = torch.cat((labels.boxes, labels.boxes.new_zeros(1, 4)))  # the last one stands for none
        cells, middles = self._centres[:, None], (boxes[:, :2] + boxes[:, 2:]) / 2  # (A, 1, 2), (G, 2)
        near = (cells - middles).abs().amax(dim=2) < REACH * STRIDE
        inside = ((cells > boxes[:, :2]) & (cells < boxes[:, 2:])).all(dim=2)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        price = torch.where(near & inside, area, math.inf)
        price[:, -1] = 1e9
        chosen = price.argmin(dim=1)
        classes = torch.cat((labels.classes, labels.classes.new_full((1,), self.num_classes)))
        return classes[chosen], boxes[chosen]
