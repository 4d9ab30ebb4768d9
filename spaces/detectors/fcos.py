"""FCOS as a Detector (Tian et al. 2019, arXiv 1904.01355), made of torchvision's parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection import FCOS as TorchvisionFCOS
from torchvision.models.detection import fcos_resnet50_fpn

from spaces.best_boxes import BestBoxes, best_pairs, best_rows
from spaces.detectors.base import Labels, Outputs, Postprocess
from spaces.detectors.dense import DenseDetector, DenseVariant, divergence, resnet18_pyramid
from spaces.detectors.torchvision_parts import targets_of


class Fcos(DenseDetector):
    """FCOS of one variant at one input size; see `DenseDetector`.

    Raw outputs are class logits `(N, A, 1 + C)`, distances from a cell's centre to the left, top, right and
    bottom of its box in strides `(N, A, 4)`, 0 or more, and centre-ness logits `(N, A, 1)`; A counts the
    cells of all levels, finest first.
    """

    _outputs = ("cls_logits", "bbox_regression", "bbox_ctrness")
    _predictors = (
        "head.classification_head.cls_logits",
        "head.regression_head.bbox_reg",
        "head.regression_head.bbox_ctrness",
    )
    _anchors_per_cell = 1

    def __init__(self, name: str, num_classes: int, size: tuple[int, int], variant: DenseVariant) -> None:
        rules = Postprocess(score_threshold=0.2, nms_iou=0.6)
        super().__init__(name, num_classes, size, variant, rules)

    def loss(self, outputs: Outputs, labels: Sequence[Labels]) -> Tensor:
        """torchvision's: focal loss of the classes, GIoU of the boxes, cross-entropy of the centre-ness.

        It is divided by the number of cells that learn a box, and where no image of the batch has one, by
        the number of images.
        """
        logits, distances, centredness = (output.float() for output in outputs)
        anchors = self._anchors.to(logits.device)
        heads = dict(zip(self._outputs, (logits, distances, centredness), strict=True))
        targets = targets_of(labels, logits.device)
        parts = self._rules.compute_loss(targets, heads, [anchors] * len(targets), self._level_counts)
        total: Tensor = sum(parts.values(), start=logits.new_zeros(()))
        blank = not any(len(target["boxes"]) for target in targets)
        return total / len(targets) if blank else total

    def distillation(self, outputs: Outputs, teacher: Outputs) -> Tensor:
        """Distance of raw outputs to a teacher's; 0 where they agree.

        Kullback-Leibler divergence of every class probability, that of the centre-ness and smooth L1 of the
        distances, both weighted by the teacher's best probability; over the sum of these, at least one for
        each image.
        """
        logits, distances, centredness = (output.float() for output in outputs)
        with torch.no_grad():
            wise, aims, middle = (output.float() for output in teacher)
            presence = wise[..., 1:].amax(dim=-1).sigmoid()
            mass = presence.sum().clamp(min=len(presence))
        boxes = F.smooth_l1_loss(distances, aims, reduction="none").sum(dim=-1)
        centres = divergence(centredness, middle).squeeze(dim=-1)
        return (divergence(logits, wise).sum() + (presence * (boxes + centres)).sum()) / mass

    def decode(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Boxes `(N, A, 4)` xyxy in input pixels and scores `(N, A, C)` in 0..1.

        A score is the geometric mean of the class's probability and the centre-ness. The outputs must be
        those of images of `preprocess.size`: the cells are constants here.
        """
        logits, distances, centredness = outputs
        boxes = _boxes(self._anchors.to(distances), distances)
        return boxes, (logits[..., 1:].sigmoid() * centredness.sigmoid()).sqrt()

    def best_boxes(self, outputs: Outputs, limit: int) -> BestBoxes:
        """The best pairs of a box and a class of one image; see `Detector`."""
        logits, distances, centredness = (output.squeeze(0) for output in outputs)
        middle = centredness.sigmoid()
        rows = best_rows(logits[:, 1:].amax(dim=1).sigmoid() * middle[:, 0], limit)
        boxes = _boxes(self._anchors.to(distances)[rows], distances[rows])
        return best_pairs(boxes, (logits[rows][:, 1:].sigmoid() * middle[rows]).sqrt(), limit)


def _boxes(cells: Tensor, distances: Tensor) -> Tensor:
    """Boxes `(..., A, 4)` xyxy in pixels at distances, in strides, from the centres of cells `(A, 4)`."""
    stride = cells[:, 2:] - cells[:, :2]
    centre = cells[:, :2] + stride / 2
    return torch.cat((centre - distances[..., :2] * stride, centre + distances[..., 2:] * stride), dim=-1)


def _resnet50(outputs: int) -> TorchvisionFCOS:
    return fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=outputs)


def _resnet18(outputs: int) -> TorchvisionFCOS:
    return TorchvisionFCOS(resnet18_pyramid(), outputs)


FCOS_RESNET50 = DenseVariant(_resnet50)
FCOS_RESNET18 = DenseVariant(_resnet18)
