"""From raw outputs to final boxes: the part of a detector that every exported file carries with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from spaces.detectors.base import Category, Detector, Postprocess


class WholeDetector(nn.Module):
    """A network with its decoding and non-maximum suppression, for one image.

    `(1, 3, H, W)` float32, preprocessed, to boxes `(N, 4)` xyxy in pixels of the input, scores `(N,)` and
    labels `(N,)` int64, category ids of the data set, best score first. Each box has one label, that of
    its best class. `torch.onnx.export(dynamo=False, opset_version=17)` takes it as it is.

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
        """Final boxes, scores and labels out of boxes `(A, 4)` and scores `(A, C)`."""
        rules = self.postprocess
        best = scores.amax(dim=1)
        if best.shape[0] > rules.pre_nms_topk:
            best, kept = best.topk(rules.pre_nms_topk)
            boxes, scores = boxes[kept], scores[kept]
        classes = scores.argmax(dim=1)
        # Boxes are kept inside the image; a class moved by more than its side then overlaps no other class,
        # so one suppression over all boxes does the work of one per class.
        boxes = torch.minimum(boxes.clamp(min=0), self.far_corner)
        side = max(self.detector.preprocess.size) + 1.0
        apart = boxes + (classes.to(boxes.dtype) * side).unsqueeze(1)
        final = suppress(apart, best, rules.nms_iou, rules.score_threshold, rules.max_detections)
        return boxes[final], best[final], self.category_ids[classes[final]]


def suppress(boxes: Tensor, scores: Tensor, iou: float, threshold: float, limit: int) -> Tensor:
    """Indices `(N,)` of the boxes that stay, best score first, N <= `limit`.

    Boxes `(K, 4)` xyxy and scores `(K,)` of one class. A box goes where it overlaps a better one by more
    than `iou`, or where its score is not above `threshold`.
    """
    return cast(Tensor, _Suppression.apply(boxes, scores, iou, threshold, limit))


class _Suppression(torch.autograd.Function):
    """In torch torchvision's NMS, in ONNX the operator with its own threshold and limit.

    torchvision exports its own without either, so that engines would go through all boxes for nothing.
    """

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, iou: float, threshold: float, limit: int) -> Tensor:
        candidates = (scores > threshold).nonzero().squeeze(1)
        kept = nms(boxes[candidates].float(), scores[candidates].float(), iou)[:limit]
        return candidates[kept]

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, iou: float, threshold: float, limit: int) -> Any:
        def constant(value: int | list[int] | list[float], dtype: torch.dtype) -> Any:
            return g.op("Constant", value_t=torch.tensor(value, dtype=dtype))

        batch = constant([0], torch.int64)
        batch_and_class = constant([0, 1], torch.int64)
        selected = g.op(  # (N, 3): image, class, box
            "NonMaxSuppression",
            g.op("Unsqueeze", boxes, batch),
            g.op("Unsqueeze", scores, batch_and_class),
            constant([limit], torch.int64),
            constant([iou], torch.float32),
            constant([threshold], torch.float32),
        )
        return g.op("Gather", selected, constant(2, torch.int64), axis_i=1)
