"""What goes into suppression: the best of a detector's boxes, before any of them goes for another."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spaces.detectors.base import Detector, Outputs

SUPPRESSION = "suppression"
"""The site where the number of boxes that go into suppression is chosen."""

BestBoxes = tuple[Tensor, Tensor, Tensor]
"""Boxes `(K, 4)`, scores `(K,)` and positions of the classes `(K,)` int64."""


def best_rows(scores: Tensor, limit: int) -> Tensor | slice:
    """Where the `limit` highest of scores `(A,)` stand, or all of fewer; an index for the first axis."""
    return scores.topk(limit).indices if scores.shape[0] > limit else slice(None)


def best_of_each_box(boxes: Tensor, scores: Tensor, limit: int) -> BestBoxes:
    """Of boxes `(A, 4)` and scores `(A, C)` the `limit` best boxes, each with its best class."""
    best = scores.amax(dim=1)
    rows = best_rows(best, limit)
    return boxes[rows], best[rows], scores[rows].argmax(dim=1)


def best_pairs(boxes: Tensor, scores: Tensor, limit: int) -> BestBoxes:
    """Of boxes `(A, 4)`, or `(A, C, 4)`, and scores `(A, C)` the `limit` best pairs of a box and a class."""
    rows = best_rows(scores.amax(dim=1), limit)  # no pair among the best K belongs to a box that is not
    boxes, scores = boxes[rows], scores[rows]
    count = scores.shape[1]
    best, pairs = scores.flatten().topk(min(limit, scores.shape[0] * count))
    held = torch.div(pairs, count, rounding_mode="trunc")
    classes = pairs - held * count
    return (boxes[held, classes] if boxes.dim() == 3 else boxes[held]), best, classes


def best_decoded(detector: Detector, outputs: Outputs, limit: int) -> BestBoxes:
    """The best of all that a detector decodes of the raw outputs of one image."""
    boxes, scores = detector.decode(outputs)
    best = best_pairs if _pairs_count(detector) else best_of_each_box
    return best(boxes[0], scores[0], limit)


def _pairs_count(detector: Detector) -> bool:
    """True where every pair of a box and a class may become a detection."""
    return bool(getattr(detector, "multi_label", False))


@dataclass(frozen=True)
class SuppressionSite:
    """What goes into suppression on the base.

    Attributes:
        limit: boxes, or pairs of a box and a class; `pre_nms_topk`, or all where there are fewer.
    """

    limit: int


def suppression_site(detector: Detector, network: nn.Module, limit: int) -> SuppressionSite:
    """The site of a base network, of which `limit` boxes may go into suppression."""
    with torch.no_grad():
        outputs = copy.deepcopy(network).eval()(torch.zeros(1, 3, *detector.preprocess.size))
        _, boxes, classes = detector.decode(outputs)[1].shape
    return SuppressionSite(min(limit, boxes * (classes if _pairs_count(detector) else 1)))
