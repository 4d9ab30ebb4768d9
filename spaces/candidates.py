"""Candidates for suppression: the best of a detector's boxes, before any of them goes for another."""

from __future__ import annotations

import torch
from torch import Tensor

Candidates = tuple[Tensor, Tensor, Tensor]
"""Boxes `(K, 4)`, scores `(K,)` and positions of the classes `(K,)` int64."""


def best_rows(scores: Tensor, limit: int) -> Tensor | slice:
    """Where the `limit` highest of scores `(A,)` stand, or all of fewer; an index for the first axis."""
    return scores.topk(limit).indices if scores.shape[0] > limit else slice(None)


def best_boxes(boxes: Tensor, scores: Tensor, limit: int) -> Candidates:
    """Of boxes `(A, 4)` and scores `(A, C)` the `limit` best boxes, each with its best class."""
    best = scores.amax(dim=1)
    rows = best_rows(best, limit)
    return boxes[rows], best[rows], scores[rows].argmax(dim=1)


def best_pairs(boxes: Tensor, scores: Tensor, limit: int) -> Candidates:
    """Of boxes `(A, 4)`, or `(A, C, 4)`, and scores `(A, C)` the `limit` best pairs of a box and a class."""
    rows = best_rows(scores.amax(dim=1), limit)  # no pair among the best K belongs to a box that is not
    boxes, scores = boxes[rows], scores[rows]
    count = scores.shape[1]
    best, pairs = scores.flatten().topk(min(limit, scores.shape[0] * count))
    held = torch.div(pairs, count, rounding_mode="trunc")
    classes = pairs - held * count
    return (boxes[held, classes] if boxes.dim() == 3 else boxes[held]), best, classes
