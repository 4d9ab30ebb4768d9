"""From raw outputs to final boxes: the part of a detector that every exported file carries with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from spaces.best_boxes import best_decoded
from spaces.detectors.base import Category, Detector, Postprocess
from spaces.suppression import suppress

FAR_APART = 2.0**16
"""Pixels from which on a corner in float32 has less than seven binary places."""


class WholeDetector(nn.Module):
    """A network with its decoding and non-maximum suppression, for one image.

    `(1, 3, H, W)` float32, preprocessed, to boxes `(N, 4)` xyxy in pixels of the input, scores `(N,)` and
    labels `(N,)` int64, category ids of the data set, best score first. Each box has one label, that of
    its best class, unless the detector is `multi_label`: then each pair of a box and a class may become a
    detection. `torch.onnx.export(dynamo=False, opset_version=17)` takes it as it is.

    Args:
        network: raw outputs from images, already `detector.simplified` where speed matters.
        detector: decodes them.
        postprocess: thresholds and limits.
        categories: of the data set, in the order of the network's classes.
    """

    category_ids: Tensor
    far_corner: Tensor
    places: Tensor

    def __init__(
        self,
        network: nn.Module,
        detector: Detector,
        postprocess: Postprocess,
        categories: Sequence[Category],
    ) -> None:
        super().__init__()
        self.network, self.detector, self.postprocess = network, detector, postprocess
        self.register_buffer("category_ids", torch.tensor([c.id for c in categories]), persistent=False)
        height, width = detector.preprocess.size
        corner = torch.tensor([width, height, width, height], dtype=torch.float32)
        self.register_buffer("far_corner", corner, persistent=False)
        self._side = max(height, width) + 1.0
        if len(categories) * self._side > FAR_APART:
            self.register_buffer("places", _places(len(categories)) * self._side, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = getattr(self.detector, "best_boxes", partial(best_decoded, self.detector))
        return self.suppressed(*own(self.network(images), self.postprocess.pre_nms_topk))

    def suppressed(self, boxes: Tensor, scores: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Final boxes, scores and labels out of the best boxes.

        Boxes are kept inside the image; a class moved by more than its side then overlaps no other class, so
        one suppression over all boxes does the work of one per class. Many classes lie in a square instead of
        along a diagonal: the farther out, the coarser are numbers in float32.
        """
        rules = self.postprocess
        boxes = torch.minimum(boxes.clamp(min=0), self.far_corner)
        if hasattr(self, "places"):
            apart = boxes + self.places[classes]
        else:
            apart = boxes + (classes.to(boxes.dtype) * self._side).unsqueeze(1)
        final = suppress(apart, scores, rules.nms_iou, rules.score_threshold, rules.max_detections)
        return boxes[final], scores[final], self.category_ids[classes[final]]


def _places(count: int) -> Tensor:
    """Where each of so many classes lies in a square of them, `(count, 4)` xyxy in squares' sides."""
    numbers, columns = torch.arange(count), math.isqrt(count - 1) + 1
    return torch.stack((numbers % columns, numbers // columns), dim=1).repeat(1, 2).float()
