"""Detectors by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from spaces.detectors.base import Detector
from spaces.detectors.dense import DenseVariant
from spaces.detectors.faster_rcnn import FasterRCNN
from spaces.detectors.faster_rcnn_variants import DIGITS, MOBILENET_320, RESNET50, RESNET50_V2, Variant
from spaces.detectors.fcos import FCOS_RESNET18, FCOS_RESNET50, Fcos
from spaces.detectors.own import own_detector
from spaces.detectors.retinanet import (
    RETINANET_RESNET18,
    RETINANET_RESNET50,
    RETINANET_RESNET50_V2,
    RetinaNet,
)
from spaces.detectors.ssd import Ssd300, SsdLite
from spaces.detectors.ultralytics_network import V8, V11, V26, Generation
from spaces.detectors.ultralytics_yolo import LICENCE, UltralyticsYolo
from spaces.detectors.yolox import YoloX
from spaces.errors import InputError

Factory = Callable[..., Detector]
"""Called with `name`, `num_classes` and `size` (height, width in pixels) as keywords."""


def _yolox(side: int, depth: float, width: float, depthwise: bool = False) -> tuple[Factory, tuple[int, int]]:
    return partial(YoloX, depth=depth, width=width, depthwise=depthwise), (side, side)


def _faster_rcnn(side: int, variant: Variant) -> tuple[Factory, tuple[int, int]]:
    return partial(FasterRCNN, variant=variant), (side, side)


def _retinanet(side: int, variant: DenseVariant) -> tuple[Factory, tuple[int, int]]:
    return partial(RetinaNet, variant=variant), (side, side)


def _fcos(side: int, variant: DenseVariant) -> tuple[Factory, tuple[int, int]]:
    return partial(Fcos, variant=variant), (side, side)


def _ultralytics(generation: Generation, scale: str) -> tuple[Factory, tuple[int, int]]:
    return partial(UltralyticsYolo, generation=generation, scale=scale), (640, 640)


# Digits are smaller than what COCO's default boxes are made for.
_DIGITS_SCALES = (0.09, 0.18, 0.33, 0.5, 0.65, 0.8, 1.0)

# Name -> how it is made, and the size that it is made for. A new detector is one line here.
DETECTORS: dict[str, tuple[Factory, tuple[int, int]]] = {
    "ssd300_vgg16": (Ssd300, (300, 300)),
    "ssd300_vgg16_stretch": (partial(Ssd300, fit="stretch"), (300, 300)),
    "ssdlite320_mobilenet_v3_large": (SsdLite, (320, 320)),
    "ssdlite320_mobilenet_v3_large_stretch": (partial(SsdLite, fit="stretch"), (320, 320)),
    "ssdlite_digits": (partial(SsdLite, scales=_DIGITS_SCALES), (224, 224)),
    "fasterrcnn_digits": _faster_rcnn(160, DIGITS),
    "fasterrcnn_mobilenet_v3_large_320_fpn": _faster_rcnn(320, MOBILENET_320),
    "fasterrcnn_resnet50_fpn": _faster_rcnn(800, RESNET50),
    "fasterrcnn_resnet50_fpn_v2": _faster_rcnn(800, RESNET50_V2),
    "retinanet_resnet18_fpn": _retinanet(320, RETINANET_RESNET18),  # torchvision publishes no weights for it
    "retinanet_resnet50_fpn": _retinanet(800, RETINANET_RESNET50),
    "retinanet_resnet50_fpn_v2": _retinanet(800, RETINANET_RESNET50_V2),
    "fcos_resnet18_fpn": _fcos(320, FCOS_RESNET18),  # nor for this one
    "fcos_resnet50_fpn": _fcos(800, FCOS_RESNET50),
    "yolox_digits": _yolox(160, 0.33, 0.1875),
    "yolox_nano": _yolox(416, 0.33, 0.25, depthwise=True),
    "yolox_tiny": _yolox(416, 0.33, 0.375),
    "yolox_s": _yolox(640, 0.33, 0.5),
    "yolox_m": _yolox(640, 0.67, 0.75),
    "yolox_l": _yolox(640, 1.0, 1.0),
    "yolox_x": _yolox(640, 1.33, 1.25),
    "yolov8n": _ultralytics(V8, "n"),
    "yolov8s": _ultralytics(V8, "s"),
    "yolov8m": _ultralytics(V8, "m"),
    "yolov8l": _ultralytics(V8, "l"),
    "yolov8x": _ultralytics(V8, "x"),
    "yolo11n": _ultralytics(V11, "n"),
    "yolo11s": _ultralytics(V11, "s"),
    "yolo11m": _ultralytics(V11, "m"),
    "yolo11l": _ultralytics(V11, "l"),
    "yolo11x": _ultralytics(V11, "x"),
    "yolo26n": _ultralytics(V26, "n"),
    "yolo26s": _ultralytics(V26, "s"),
    "yolo26m": _ultralytics(V26, "m"),
    "yolo26l": _ultralytics(V26, "l"),
    "yolo26x": _ultralytics(V26, "x"),
}


def make_detector(name: str, num_classes: int, size: tuple[int, int] | None = None) -> Detector:
    """The detector of that name for a data set of `num_classes` categories.

    Args:
        name: one of `DETECTORS`, or `package.module:Class` or `file.py:Class` of a user, called with
            `name`, `num_classes` and, where one is given, `size`.
        num_classes: number of categories.
        size: height and width of the input in pixels; that of the published weights if None.

    Raises:
        InputError: an unknown name, or a size or number that the detector does not take.
    """
    if name in DETECTORS:
        factory, usual = DETECTORS[name]
        return factory(name=name, num_classes=num_classes, size=size or usual)
    if ":" not in name:
        known = ", ".join(DETECTORS)
        remedy = f"unknown; choose one of {known}, package.module:Class or file.py:Class"
        raise InputError("model", name, remedy)
    return own_detector(name, num_classes, size)


def licence_of(name: str) -> str | None:
    """What a user must know about the licence of a detector that is not Paredown's own; None where it is."""
    factory = DETECTORS[name][0] if name in DETECTORS else None
    return LICENCE if isinstance(factory, partial) and factory.func is UltralyticsYolo else None
