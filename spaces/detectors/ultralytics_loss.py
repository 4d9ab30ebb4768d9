"""The task loss of Ultralytics' networks, which is their own, and the distance to a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spaces.detectors.base import Labels, Outputs
from spaces.detectors.ultralytics_network import Generation, library


class UltralyticsLoss:
    """Their detection loss with their default gains: CIoU and distances of boxes, cross-entropy of classes.

    End-to-end generations have that of their one-to-one head, one cell for an object. Assignments are those
    of TOOD (Feng et al. 2021, arXiv 2108.07755), distance distributions those of Li et al. 2020
    (arXiv 2006.04388).

    Args:
        generation: of the family.
        num_classes: number of categories.
        strides: of the levels in pixels, finest first.
        device: where the outputs lie.

    Raises:
        InputError: their package is not installed.
    """

    def __init__(
        self, generation: Generation, num_classes: int, strides: Sequence[int], device: torch.device
    ) -> None:
        losses, gains = library("ultralytics.utils.loss"), library("ultralytics.utils").DEFAULT_CFG
        head = SimpleNamespace(
            stride=torch.tensor(strides, dtype=torch.float32, device=device),
            nc=num_classes,
            reg_max=generation.bins,
        )
        # All that their losses ask a model for.
        model = SimpleNamespace(
            parameters=lambda: iter([torch.zeros((), device=device)]), args=gains, model=[head]
        )
        end_to_end = generation.end_to_end
        self._theirs = losses.E2ELoss(model).one2one if end_to_end else losses.v8DetectionLoss(model)
        self._assigner = self._theirs.assigner
        self._theirs.assigner = self._assigned
        self._mass = torch.zeros((), device=device)

    def __call__(self, outputs: Outputs, labels: Sequence[Labels]) -> Tensor:
        """The loss, a scalar; boxes in pixels of the network's input.

        Theirs is over the sum of the batch's target scores, at least 1; here at least 1 for each image, so
        that the size of a batch does not matter.
        """
        boxes, scores, maps = joined(outputs)
        height, width = (side * self._theirs.stride[0] for side in maps[0].shape[2:])
        corners = torch.cat([image.boxes for image in labels]).to(boxes.device, torch.float32)
        first, last = corners[:, :2], corners[:, 2:]
        sides = torch.stack((width, height))
        rows = torch.cat([torch.full((len(image.boxes),), k) for k, image in enumerate(labels)])
        batch = {
            "batch_idx": rows.to(corners),
            "cls": torch.cat([image.classes for image in labels]).to(corners),
            "bboxes": torch.cat(((first + last) / 2 / sides, (last - first) / sides), dim=1),
        }
        parts, _ = self._theirs({"boxes": boxes, "scores": scores, "feats": maps}, batch)
        images = len(labels)
        total: Tensor = parts.sum() / images
        return total * (self._mass.clamp(min=1) / self._mass.clamp(min=images))

    def _assigned(self, *arguments: Any, **options: Any) -> Any:
        found = self._assigner(*arguments, **options)
        self._mass = found[2].sum()  # of the target scores
        return found


def joined(outputs: Outputs) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Box sides `(N, 4 * bins, A)`, class logits `(N, C, A)`, both float32, and the maps of the levels."""
    levels = len(outputs) // 2
    boxes, scores = (
        torch.cat([level.float().flatten(2) for level in part], dim=2)
        for part in (outputs[:levels], outputs[levels:])
    )
    return boxes, scores, [level.float() for level in outputs[:levels]]


def distillation(outputs: Outputs, teacher: Outputs, bins: int) -> Tensor:
    """Distance of raw outputs to a teacher's; 0 where they agree.

    Kullback-Leibler divergence of all class scores, and that of the four distance distributions, or smooth L1
    of the distances in strides where there are none, weighted by the teacher's best class score; all over the
    sum of these scores, at least one for each image.
    """
    sides, logits, _ = joined(outputs)
    with torch.no_grad():
        wise_sides, wise, _ = joined(teacher)
        scores = wise.sigmoid()
        own = F.binary_cross_entropy_with_logits(wise, scores, reduction="none")
        presence = scores.amax(dim=1)
        mass = presence.sum().clamp(min=len(presence))
    classes = F.binary_cross_entropy_with_logits(logits, scores, reduction="none") - own
    if bins > 1:
        student, aims = (
            part.reshape(-1, 4, bins, part.shape[2]).log_softmax(dim=2) for part in (sides, wise_sides)
        )
        boxes = F.kl_div(student, aims, reduction="none", log_target=True).sum(dim=(1, 2))
    else:
        boxes = F.smooth_l1_loss(sides, wise_sides, reduction="none").sum(dim=1)
    return (classes.sum() + (presence * boxes).sum()) / mass
