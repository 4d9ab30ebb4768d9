"""The base's exported file against torch, before anything is quantised: the same boxes within tolerances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluators.targets.base import Detections, Session

SCORE_TOLERANCE = 1e-3
BOX_TOLERANCE = 0.1
"""Pixels of the network's input, for each corner."""
LEFT_OUT = 0.02
"""Share of the boxes that may be missing on either side: suppression decides pairs at its threshold, the
limit on boxes and the score threshold by the last digit, which engines round differently."""


class ParityError(RuntimeError):
    """An engine finds other boxes than torch does."""


@dataclass(frozen=True)
class Parity:
    """How far two sessions are apart.

    Attributes:
        images: that were compared.
        boxes: found by both sides together, on average of the two.
        unmatched: boxes of either side without a partner within the tolerances.
        score_error, box_error: largest differences within the pairs; the latter in pixels.
    """

    images: int
    boxes: float
    unmatched: int
    score_error: float
    box_error: float

    @property
    def holds(self) -> bool:
        """True where as good as all boxes have a partner."""
        return self.unmatched <= LEFT_OUT * 2 * self.boxes


def compare_sessions(ours: Session, theirs: Session, images: Sequence[NDArray[np.float32]]) -> Parity:
    """Pair the boxes that two sessions find.

    A pair has the same label, scores within `SCORE_TOLERANCE` and corners within `BOX_TOLERANCE`.

    Args:
        ours, theirs: of the same weights, such as an engine and torch.
        images: each `(1, 3, H, W)` float32, preprocessed; with a blank and a crowded one among them.
    """
    total, unmatched, scores, boxes = 0, 0, 0.0, 0.0
    for image in images:
        a, b = ours.run(image), theirs.run(image)
        pairs, score_error, box_error = _pairs(a, b)
        total += len(a.scores) + len(b.scores)
        unmatched += len(a.scores) + len(b.scores) - 2 * pairs
        scores, boxes = max(scores, score_error), max(boxes, box_error)
    return Parity(len(images), total / 2, unmatched, scores, boxes)


def require_parity(
    ours: Session,
    theirs: Session,
    images: Sequence[NDArray[np.float32]],
    otherwise: str = "the exported base does not find what torch finds",
) -> Parity:
    """`compare_sessions`, which must hold.

    Args:
        ours, theirs, images: to compare.
        otherwise: begins what is raised.

    Raises:
        ParityError: it does not.
    """
    found = compare_sessions(ours, theirs, images)
    if not found.holds:
        raise ParityError(
            f"{otherwise}: {found.unmatched} of {2 * found.boxes:.0f} boxes "
            f"on {found.images} images have no partner within {SCORE_TOLERANCE} in score and "
            f"{BOX_TOLERANCE} pixels"
        )
    return found


def _pairs(a: Detections, b: Detections) -> tuple[int, float, float]:
    """Number of pairs, and the largest difference in score and in a corner within them."""
    scores = np.abs(a.scores[:, None] - b.scores[None])
    corners = np.abs(a.boxes[:, None] - b.boxes[None]).max(axis=2, initial=0.0)
    near = (scores <= SCORE_TOLERANCE) & (corners <= BOX_TOLERANCE) & (a.labels[:, None] == b.labels[None])
    free, count, score_error, box_error = np.ones(len(b.scores), bool), 0, 0.0, 0.0
    for i in range(len(a.scores)):
        partners = np.flatnonzero(near[i] & free)
        if not partners.size:
            continue
        best = partners[corners[i, partners].argmin()]
        free[best] = False
        count += 1
        score_error = max(score_error, float(scores[i, best]))
        box_error = max(box_error, float(corners[i, best]))
    return count, score_error, box_error
