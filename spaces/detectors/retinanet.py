"""RetinaNet as a Detector (Lin et al. 2017, arXiv 1708.02002), made of torchvision's parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection import retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2

from spaces.best_boxes import BestBoxes, best_pairs, best_rows
from spaces.detectors.base import Labels, Outputs, Postprocess
from spaces.detectors.dense import DenseDetector, DenseVariant, divergence, resnet18_pyramid
from spaces.detectors.faster_rcnn_network import decoded
from spaces.detectors.torchvision_parts import targets_of


class RetinaNet(DenseDetector):
    """RetinaNet of one variant at one input size; see `DenseDetector`.

    Raw outputs are class logits `(N, A, 1 + C)` and deltas of the anchors `(N, A, 4)`; A counts the anchors
    of all levels, finest first, nine a cell.
    """

    _outputs = ("cls_logits", "bbox_regression")
    _predictors = ("head.classification_head.cls_logits", "head.regression_head.bbox_reg")
    _anchors_per_cell = 9

    def __init__(self, name: str, num_classes: int, size: tuple[int, int], variant: DenseVariant) -> None:
        rules = Postprocess(score_threshold=0.05, nms_iou=0.5)
        super().__init__(name, num_classes, size, variant, rules)

    def loss(self, outputs: Outputs, labels: Sequence[Labels]) -> Tensor:
        """torchvision's: focal loss of the classes, and L1 or GIoU of the boxes, by variant."""
        logits, deltas = (output.float() for output in outputs)
        anchors = self._anchors.to(logits.device)
        heads = {"cls_logits": logits, "bbox_regression": deltas}
        targets = targets_of(labels, logits.device)
        parts = self._rules.compute_loss(targets, heads, [anchors] * len(targets))
        total: Tensor = parts["classification"] + parts["bbox_regression"]
        return total

    def distillation(self, outputs: Outputs, teacher: Outputs) -> Tensor:
        """Distance of raw outputs to a teacher's; 0 where they agree.

        Kullback-Leibler divergence of every class probability, and smooth L1 of the deltas weighted by the
        teacher's best probability; over the sum of these, at least one for each image.
        """
        logits, deltas = (output.float() for output in outputs)
        with torch.no_grad():
            wise, aims = (output.float() for output in teacher)
            presence = wise[..., 1:].amax(dim=-1).sigmoid()
            mass = presence.sum().clamp(min=len(presence))
        boxes = F.smooth_l1_loss(deltas, aims, reduction="none").sum(dim=-1)
        return (divergence(logits, wise).sum() + (presence * boxes).sum()) / mass

    def decode(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Boxes `(N, A, 4)` xyxy in input pixels and scores `(N, A, C)` in 0..1.

        The outputs must be those of images of `preprocess.size`: the anchors are constants here.
        """
        logits, deltas = outputs
        return decoded(deltas, self._anchors.to(deltas)), logits[..., 1:].sigmoid()

    def best_boxes(self, outputs: Outputs, limit: int) -> BestBoxes:
        """The best pairs of a box and a class of one image; see `Detector`."""
        logits, deltas = (output.squeeze(0) for output in outputs)
        rows = best_rows(logits[:, 1:].amax(dim=1), limit)
        boxes = decoded(deltas[rows], self._anchors.to(deltas)[rows])
        return best_pairs(boxes, logits[rows][:, 1:].sigmoid(), limit)


def _resnet50(outputs: int) -> TorchvisionRetinaNet:
    return retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=outputs)


def _resnet50_v2(outputs: int) -> TorchvisionRetinaNet:
    return retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=outputs)


def _resnet18(outputs: int) -> TorchvisionRetinaNet:
    return TorchvisionRetinaNet(resnet18_pyramid(), outputs)


# The first weights of torchvision were trained with frozen BatchNorm that added nothing to the variances;
# this much is nothing to them either, and keeps a channel that is always 0 finite.
RETINANET_RESNET50 = DenseVariant(_resnet50, norm_epsilon=1e-10)
RETINANET_RESNET50_V2 = DenseVariant(_resnet50_v2)
RETINANET_RESNET18 = DenseVariant(_resnet18)
