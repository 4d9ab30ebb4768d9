"""What the families borrowed from torchvision share: a network of backbone and head, anchors, targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from spaces.detectors.base import Labels, Outputs

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE = 1 / 255
_THINNEST = 1e-3  # pixels; the logarithm of a thinner box's side is no target to learn


class HeadOutputs(nn.Module):
    """Backbone and head of a torchvision detector, under torchvision's names: images to raw outputs.

    Args:
        model: of which `backbone` and `head` are taken over.
        names: of the head's outputs, in the order in which they are returned.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.backbone, self.head = model.backbone, model.head
        self.names = tuple(names)

    def forward(self, images: Tensor) -> Outputs:
        head: Any = self.head
        backbone: Any = self.backbone
        outputs = head(list(backbone(images).values()))
        return tuple(outputs[name] for name in self.names)


def without_weights(make: Callable[[], nn.Module]) -> Any:
    """A torchvision model on the meta device: its loss and anchors work, its layers hold nothing."""
    with torch.device("meta"):
        return make().eval()


def anchors_of(model: Any, size: tuple[int, int]) -> tuple[Tensor, list[int]]:
    """A model's anchors for images of `size` (height, width).

    Args:
        model: from `without_weights`.

    Returns:
        Anchors `(A, 4)` xyxy in pixels, and how many of them each level has.
    """
    with torch.no_grad():
        levels = model.backbone(torch.empty(1, 3, *size, device="meta")).values()
    grids = [torch.empty(1).expand(1, 1, *level.shape[2:]) for level in levels]
    images = ImageList(torch.empty(1).expand(1, 3, *size), [size])
    per_cell = model.anchor_generator.num_anchors_per_location()
    counts = [grid.shape[2] * grid.shape[3] * each for grid, each in zip(grids, per_cell, strict=True)]
    return model.anchor_generator(images, grids)[0], counts


def targets_of(labels: Sequence[Labels], device: torch.device) -> list[dict[str, Tensor]]:
    """Labels as torchvision's losses take them: 0 is the background, boxes without extent are left out."""
    targets = []
    for image in labels:
        extent = image.boxes[:, 2:] - image.boxes[:, :2]
        solid = (extent > _THINNEST).all(dim=1)
        targets.append(
            {"boxes": image.boxes[solid].to(device), "labels": image.classes[solid].to(device) + 1}
        )
    return targets
