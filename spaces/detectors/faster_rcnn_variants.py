"""Which Faster R-CNN: torchvision's models by name, and a small one for the embedded digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torchvision.models import mobilenet_v3_large
from torchvision.models.detection import (
    FasterRCNN,
    fasterrcnn_mobilenet_v3_large_320_fpn,
    fasterrcnn_resnet50_fpn,
    fasterrcnn_resnet50_fpn_v2,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

_DIGIT_LEVELS = {"6": "0", "12": "1", "16": "2"}  # MobileNetV3's last layers at strides 8, 16 and 32
_DIGIT_CHANNELS = 96
_DIGIT_HEAD = 256
_DIGIT_SIZES = ((12, 18, 26), (36, 46, 58), (64, 80, 96), (112, 128, 144))  # pixels, square root of the area
_DIGIT_RATIOS = (1.2, 2.0)  # height over width


@dataclass(frozen=True)
class Variant:
    """A Faster R-CNN of torchvision's parts.

    Attributes:
        make: torchvision's model with fresh weights, from the number of outputs, the background included.
        strides: of the backbone's levels that the pyramid is built on.
        proposals: regions of an image that the box head looks at.
        candidates: best anchors a level that go into suppression.
        score_threshold: probability of an object that a proposal needs.
        norm_epsilon: added to the variances of all BatchNorm.
    """

    make: Callable[[int], FasterRCNN]
    strides: tuple[int, ...]
    proposals: int
    candidates: int
    score_threshold: float = 0.0
    norm_epsilon: float = 1e-5


def _mobilenet(outputs: int) -> FasterRCNN:
    return fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=outputs)


def _resnet50(outputs: int) -> FasterRCNN:
    return fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=outputs)


def _resnet50_v2(outputs: int) -> FasterRCNN:
    return fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=outputs)


def _digits(outputs: int) -> FasterRCNN:
    """Half of MobileNetV3's width, a pyramid from stride 8, where digits of 14 pixels can be told apart.

    The published model begins at stride 32, which at 160 pixels leaves five by five cells.
    """
    features = mobilenet_v3_large(weights=None, width_mult=0.5, norm_layer=nn.BatchNorm2d).features
    inputs = [features[int(layer)].out_channels for layer in _DIGIT_LEVELS]
    backbone = BackboneWithFPN(features, _DIGIT_LEVELS, inputs, _DIGIT_CHANNELS, norm_layer=nn.BatchNorm2d)
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(_DIGIT_SIZES, (_DIGIT_RATIOS,) * len(_DIGIT_SIZES)),
        box_head=TwoMLPHead(_DIGIT_CHANNELS * 7 * 7, _DIGIT_HEAD),
        box_predictor=FastRCNNPredictor(_DIGIT_HEAD, outputs),
    )


DIGITS = Variant(_digits, (8, 16, 32), proposals=48, candidates=96)
MOBILENET_320 = Variant(_mobilenet, (32, 32), proposals=150, candidates=150, score_threshold=0.05)
# torchvision takes 1000 proposals. Its weights were trained with frozen BatchNorm that added nothing to the
# variances; this much is nothing to them either, and keeps a channel that is always 0 finite.
RESNET50 = Variant(_resnet50, (4, 8, 16, 32), proposals=300, candidates=300, norm_epsilon=1e-10)
RESNET50_V2 = Variant(_resnet50_v2, (4, 8, 16, 32), proposals=300, candidates=300)
