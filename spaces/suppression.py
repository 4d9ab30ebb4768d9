"""Non-maximum suppression that runs in torch and exports as one ONNX operator."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torchvision.ops import nms


def suppress(boxes: Tensor, scores: Tensor, iou: float, threshold: float, limit: int) -> Tensor:
    """Indices `(N,)` of the boxes that stay, best score first, N <= `limit`.

    Boxes `(K, 4)` xyxy and scores `(K,)` of one class. A box goes where it overlaps a better one by more
    than `iou`, or where its score is not above `threshold`. An `iou` of 1 suppresses nothing, and no operator
    for it is exported.
    """
    if iou >= 1:
        best, order = scores.topk(min(limit, scores.shape[0]))
        return order[(best > threshold).nonzero().squeeze(1)]
    script: Any = torch.jit  # its functions have no annotations
    if script.is_tracing() and not torch.onnx.is_in_onnx_export():
        return _suppressed(boxes, scores, iou, threshold, limit)  # TorchScript holds no Python functions
    return cast(Tensor, _Suppression.apply(boxes, scores, iou, threshold, limit))


def _suppressed(boxes: Tensor, scores: Tensor, iou: float, threshold: float, limit: int) -> Tensor:
    candidates = (scores > threshold).nonzero().squeeze(1)
    kept = nms(boxes[candidates].float(), scores[candidates].float(), iou)[:limit]
    return candidates[kept]


class _Suppression(torch.autograd.Function):
    """In torch torchvision's NMS, in ONNX the operator with its own threshold and limit.

    torchvision exports its own without either, so that engines would go through all boxes for nothing.
    """

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, iou: float, threshold: float, limit: int) -> Tensor:
        return _suppressed(boxes, scores, iou, threshold, limit)

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
