"""SSD (Liu et al. 2016, arXiv 1512.02325) and SSDLite (Sandler et al. 2018, arXiv 1801.04381)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import ssd300_vgg16, ssdlite320_mobilenet_v3_large
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.ops import box_iou

from spaces.detectors.base import Labels, Outputs, Postprocess, Preprocess
from spaces.detectors.folding import folded
from spaces.detectors.torchvision_parts import SCALE, HeadOutputs, anchors_of, targets_of, without_weights
from spaces.errors import InputError

_HEADS = ("classification_head", "regression_head")
_LEVELS = 6
_SMALLEST = 64  # pixels


class _Ssd(ABC):
    """What both have in common.

    torchvision's own weights saw their images stretched to the input; `fit="stretch"` does so here, too. What
    serves the exported file must then do the same, where all other files take letterboxed images.

    Raw outputs are class logits `(N, A, 1 + C)`, background first, and box codes `(N, A, 4)`; A counts the
    default boxes of all levels, finest first.
    """

    multi_label = True
    _predictor: str  # from an entry of a head's module_list to the layer that predicts

    def __init__(self, name: str, num_classes: int, preprocess: Preprocess, postprocess: Postprocess) -> None:
        if num_classes < 1:
            raise InputError("num_classes", num_classes, "a detector needs at least one category")
        if min(preprocess.size) < _SMALLEST:
            raise InputError("size", preprocess.size, f"height and width must be at least {_SMALLEST}")
        self.name, self.num_classes = name, num_classes
        self.preprocess, self.postprocess = preprocess, postprocess
        self._rules = without_weights(self._model)
        self._anchors, _ = anchors_of(self._rules, preprocess.size)

    @abstractmethod
    def _model(self) -> Any:
        """torchvision's model with fresh weights."""

    def build(self) -> nn.Module:
        """A new network with fresh weights, in training mode; its weights have torchvision's names."""
        return HeadOutputs(self._model(), ("cls_logits", "bbox_regression"))

    def output_layers(self, network: nn.Module) -> frozenset[str]:
        """The convolutions that predict classes and boxes, at all levels."""
        return frozenset(
            f"head.{head}.module_list.{level}{self._predictor}" for head in _HEADS for level in range(_LEVELS)
        )

    def loss(self, outputs: Outputs, labels: Sequence[Labels]) -> Tensor:
        """torchvision's MultiBox loss (section 2.2 of the paper), hard negatives 3 to 1.

        Images without boxes teach nothing there; here the three hardest default boxes of each count as
        background.
        """
        logits, codes = (output.float() for output in outputs)
        anchors = self._anchors.to(logits.device)
        targets = targets_of(labels, logits.device)
        matched = [self._matched(target["boxes"], anchors) for target in targets]
        heads = {"cls_logits": logits, "bbox_regression": codes}
        parts = self._rules.compute_loss(targets, heads, [anchors] * len(targets), matched)
        total: Tensor = parts["classification"] + parts["bbox_regression"]
        blank = [row for row, target in enumerate(targets) if not len(target["boxes"])]
        if blank:
            background = -F.log_softmax(logits[blank], dim=-1)[..., 0]
            hardest = background.topk(round(self._rules.neg_to_pos_ratio), dim=1).values
            learnt = sum(int((found >= 0).sum()) for found in matched)
            total = total + hardest.sum() / max(learnt, len(labels))
        return total

    def _matched(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """The box `(A,)` int64 that each default box learns, -1 for background."""
        if not len(boxes):
            return torch.full((len(anchors),), -1, device=anchors.device)
        matched: Tensor = self._rules.proposal_matcher(box_iou(boxes, anchors))
        return matched

    def distillation(self, outputs: Outputs, teacher: Outputs) -> Tensor:
        """Distance of raw outputs to a teacher's; 0 where they agree.

        Kullback-Leibler divergence of the class scores at all default boxes, which where the teacher sees
        background is that of "an object or none", and smooth L1 of the box codes weighted by the teacher's
        probability of an object; over the sum of these probabilities, at least one for each image.
        """
        logits, codes = (output.float() for output in outputs)
        with torch.no_grad():
            wise, aims = (output.float() for output in teacher)
            wise = wise.log_softmax(dim=-1)
            presence = 1 - wise[..., 0].exp()
            mass = presence.sum().clamp(min=len(presence))
        classes = F.kl_div(logits.log_softmax(dim=-1), wise, reduction="none", log_target=True)
        boxes = F.smooth_l1_loss(codes, aims, reduction="none").sum(dim=-1)
        return (classes.sum() + (presence * boxes).sum()) / mass

    def decode(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Boxes `(N, A, 4)` xyxy in input pixels and scores `(N, A, C)` in 0..1, softmax without background.

        The outputs must be those of images of `preprocess.size`: the default boxes are constants here.
        """
        logits, codes = outputs
        images = logits.shape[0]
        anchors = self._anchors.to(codes).repeat(images, 1)
        boxes: Tensor = self._rules.box_coder.decode_single(codes.reshape(-1, 4), anchors)
        return boxes.reshape(images, -1, 4), logits.softmax(dim=-1)[..., 1:]

    def class_layers(self) -> dict[str, tuple[int, int]]:
        """The class predictors; see `Detector`."""
        per_cell = self._rules.anchor_generator.num_anchors_per_location()
        return {
            f"head.classification_head.module_list.{level}{self._predictor}": (per_cell[level], 1)
            for level in range(_LEVELS)
        }

    def simplified(self, network: nn.Module) -> nn.Module:
        """A copy in evaluation mode with BatchNorm folded."""
        return folded(network)


class SsdLite(_Ssd):
    """SSDLite on MobileNetV3-large, with the reduced tail that torchvision's COCO weights have.

    Args:
        name: the name in the registry, written into recipes.
        num_classes: number of categories of the data set.
        size: height and width of the input in pixels, at least 64.
        scales: sides of the default boxes over the image's, one for each level and one beyond;
            torchvision's 0.2 to 0.95 and 1 if None.

    Raises:
        InputError: a size that is too small, or no category.
    """

    _predictor = ".1"

    def __init__(
        self,
        name: str,
        num_classes: int,
        size: tuple[int, int],
        scales: Sequence[float] | None = None,
        fit: Literal["letterbox", "stretch"] = "letterbox",
    ) -> None:
        self._scales = scales
        half = (0.5, 0.5, 0.5)
        look = Preprocess(size=size, scale=SCALE, mean=half, std=half, fit=fit)
        super().__init__(name, num_classes, look, Postprocess(score_threshold=0.001, nms_iou=0.55))

    def _model(self) -> Any:
        model = ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=self.num_classes + 1
        )
        if self._scales is not None:
            ratios = model.anchor_generator.aspect_ratios
            model.anchor_generator = DefaultBoxGenerator(ratios, scales=list(self._scales))
        return model

    def block_of(self, layer: str) -> str:
        """`features.0.0` ... `features.1.3`, `extra.0` ... `extra.3`, `head.level0` ... `head.level5`."""
        part, inner, *rest = layer.split(".")
        if part == "head":
            return f"head.level{rest[1]}"
        return f"features.{rest[0]}.{rest[1]}" if inner == "features" else f"extra.{rest[0]}"

    def stage_of(self, layer: str) -> str:
        """`stem` (stride 2), `stride4`, `stride8`, `stride16`, `stride32`, `extra` or `head`."""
        part, inner, *rest = layer.split(".")
        if part == "head" or inner == "extra":
            return "head" if part == "head" else "extra"
        if rest[0] == "1":
            return "stride32"
        # MobileNetV3-large halves the resolution in its blocks 2, 4, 7 and, of which only the expansion is
        # here, 13.
        block = int(rest[1])
        return "stem" if block < 2 else "stride4" if block < 4 else "stride8" if block < 7 else "stride16"


class Ssd300(_Ssd):
    """SSD on VGG-16 as torchvision's `ssd300_vgg16`.

    At 300 x 300 default boxes lie where the published weights have them, elsewhere in the middle of cells.
    Below 268 pixels the last levels would be smaller than their kernels, which are padded then.

    Args:
        name: the name in the registry, written into recipes.
        num_classes: number of categories of the data set.
        size: height and width of the input in pixels, at least 64.

    Raises:
        InputError: a size that is too small, or no category.
    """

    _predictor = ""

    def __init__(
        self,
        name: str,
        num_classes: int,
        size: tuple[int, int],
        fit: Literal["letterbox", "stretch"] = "letterbox",
    ) -> None:
        mean, unit = (0.48235, 0.45882, 0.40784), (SCALE, SCALE, SCALE)
        look = Preprocess(size=size, scale=SCALE, mean=mean, std=unit, fit=fit)
        super().__init__(name, num_classes, look, Postprocess(score_threshold=0.01, nms_iou=0.45))

    def _model(self) -> Any:
        model = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=self.num_classes + 1)
        height, width = self.preprocess.size
        if (height, width) != (300, 300):
            model.anchor_generator.steps = None
        sides = [_last_sides(height), _last_sides(width)]
        for level, (vertical, horizontal) in enumerate(zip(*sides, strict=True)):
            conv = model.backbone.extra[3 + level][2]
            conv.padding = (int(vertical < 3), int(horizontal < 3))
        return model

    def block_of(self, layer: str) -> str:
        """`conv1` ... `conv5`, `fc`, `extra.1` ... `extra.4`, `head.level0` ... `head.level5`."""
        part, inner, *rest = layer.split(".")
        if part == "head":
            return f"head.level{rest[1]}"
        if inner == "features":
            return f"conv{1 + sum(int(rest[0]) > pool for pool in (4, 9, 16))}"
        if rest[0] == "0":
            return "fc" if rest[1] == "7" else "conv5"
        return f"extra.{rest[0]}"

    def stage_of(self, layer: str) -> str:
        """`conv1` ... `conv5`, `fc`, `extra` or `head`."""
        return self.block_of(layer).split(".")[0]


def _last_sides(side: int) -> tuple[int, int]:
    """Cells along a side that the last two convolutions read, pixels of the image given."""
    for halving in ("floor", "floor", "ceil", "floor", "ceil", "ceil"):
        side = side // 2 if halving == "floor" else -(-side // 2)
    return side, side - 2 if side >= 3 else side
