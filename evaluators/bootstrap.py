"""COCO mAP on many resamples of the images at once, from detections that were matched once.

Drawing an image twice is to count its objects and detections twice, so a resample is a vector of counts,
and average precision is a function of weighted cumulative sums. The result is that of pycocotools on a
data set in which the images are really repeated (up to the order of equal scores in one image).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RECALLS = np.linspace(0.0, 1.0, 101)  # at which COCO samples the precision


@dataclass(frozen=True)
class CategoryMatches:
    """What the detections of one category matched, in the order of falling score.

    Attributes:
        images: `(D,)` position of the detection's image.
        hits: `(T, D)` bool, at each of T IoU thresholds: matched an object that counts.
        counted: `(T, D)` bool, false where a detection is ignored (on a crowd region).
        objects: `(I,)` number of objects that count in each of I images.
    """

    images: NDArray[np.int64]
    hits: NDArray[np.bool_]
    counted: NDArray[np.bool_]
    objects: NDArray[np.int64]


def mean_average_precision(
    matches: Sequence[CategoryMatches], weights: NDArray[np.int64]
) -> NDArray[np.float64]:
    """COCO AP@[.50:.95], 0..100, `(R,)`, with image i taken `weights[r, i]` times in resample r.

    As in COCO, a category without objects in a resample does not count there; NaN if none has any.
    """
    totals = np.zeros(len(weights))
    present = np.zeros(len(weights))
    for category in matches:
        objects = weights @ category.objects
        has_objects = objects > 0
        present += has_objects
        totals += np.where(has_objects, _average_precision(category, weights, np.maximum(objects, 1)), 0.0)
    with np.errstate(invalid="ignore"):
        result: NDArray[np.float64] = 100.0 * totals / np.where(present > 0, present, np.nan)
    return result


def difference_interval(
    a: Sequence[CategoryMatches], b: Sequence[CategoryMatches], images: int, resamples: int, seed: int
) -> tuple[float, float, float]:
    """mAP of `a` minus that of `b`: on all images, and its 2.5 and 97.5 percentiles over resamples."""
    drawn = np.random.default_rng(seed).multinomial(images, np.full(images, 1.0 / images), size=resamples)
    weights = np.concatenate([np.ones((1, images), dtype=np.int64), drawn.astype(np.int64)])
    differences = mean_average_precision(a, weights) - mean_average_precision(b, weights)
    low, high = np.nanpercentile(differences[1:], [2.5, 97.5])
    return float(differences[0]), float(low), float(high)


def _average_precision(
    category: CategoryMatches, weights: NDArray[np.int64], objects: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Mean over the IoU thresholds of the precision sampled at 101 recalls, `(R,)` in 0..1."""
    total = np.zeros(len(weights))
    if not category.hits.any():
        return total
    drawn = weights[:, category.images]
    for hits, counted in zip(category.hits, category.counted, strict=True):
        at = np.flatnonzero(hits)
        if not at.size:
            continue
        # Only the detections that hit raise the recall, so precision is needed at these alone.
        found = np.cumsum(drawn[:, at], axis=1)
        claimed = np.cumsum(drawn * counted, axis=1)[:, at]
        precision = found / np.maximum(claimed, 1)
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        reached = np.searchsorted(_RECALLS, found / objects[:, None], side="right")
        newly = np.diff(reached, axis=1, prepend=0)
        total += (envelope * newly).sum(axis=1)
    return total / (len(category.hits) * len(_RECALLS))
