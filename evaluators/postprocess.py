"""From raw outputs to final boxes: the part of a detector that every exported file carries with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spaces.detectors.base import Category, Detector, Postprocess
from spaces.suppression import suppress


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

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores = self.detector.decode(self.network(images))
        return self.select(boxes[0], scores[0])

    def select(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Final boxes, scores and labels out of boxes `(A, 4)`, or `(A, C, 4)`, and scores `(A, C)`."""
        pick = self._pairs if getattr(self.detector, "multi_label", False) else self._best
        boxes, best, classes = pick(boxes, scores)
        # Boxes are kept inside the image; a class moved by more than its side then overlaps no other class,
        # so one suppression over all boxes does the work of one per class.
        rules = self.postprocess
        boxes = torch.minimum(boxes.clamp(min=0), self.far_corner)
        side = max(self.detector.preprocess.size) + 1.0
        apart = boxes + (classes.to(boxes.dtype) * side).unsqueeze(1)
        final = suppress(apart, best, rules.nms_iou, rules.score_threshold, rules.max_detections)
        return boxes[final], best[final], self.category_ids[classes[final]]

    def _best(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes `(K, 4)`, each with the score and the class of its best class, `(K,)`."""
        limit = self.postprocess.pre_nms_topk
        best = scores.amax(dim=1)
        if best.shape[0] > limit:
            best, kept = best.topk(limit)
            boxes, scores = boxes[kept], scores[kept]
        return boxes, best, scores.argmax(dim=1)

    def _pairs(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes `(K, 4)`, scores and classes `(K,)`, of the best pairs of a box and a class."""
        limit, count = self.postprocess.pre_nms_topk, scores.shape[1]
        if boxes.shape[0] > limit:  # no pair among the best K belongs to a box that is not
            _, rows = scores.amax(dim=1).topk(limit)
            boxes, scores = boxes[rows], scores[rows]
        best, pairs = scores.flatten().topk(min(limit, boxes.shape[0] * count))
        rows = torch.div(pairs, count, rounding_mode="trunc")
        classes = pairs - rows * count
        return (boxes[rows, classes] if boxes.dim() == 3 else boxes[rows]), best, classes
