"""COCO average precision of detections, and of an exported model in the session that runs it.

pycocotools is the reference: every figure is its own. Average precision is in 0..100.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evaluators.bootstrap import CategoryMatches, difference_interval
from evaluators.datasets.letterbox import LetterboxedImages, network_input
from evaluators.datasets.split import DetectionSplit
from evaluators.targets.base import Detections, Session
from spaces.detectors.base import Preprocess
from spaces.errors import InputError

FIGURES = (
    "map",
    "map_50",
    "map_75",
    "map_small",
    "map_medium",
    "map_large",
    "ar_1",
    "ar_10",
    "ar_100",
    "ar_small",
    "ar_medium",
    "ar_large",
)
"""The 12 figures of pycocotools in its order: `map` is AP@[.50:.95], `ar_10` recall at 10 boxes an image."""


def coco_figures(split: DetectionSplit, detections: Mapping[int, Detections]) -> dict[str, float]:
    """The 12 COCO figures, in 0..100.

    A figure about objects that the split has none of (pycocotools says -1) is NaN; write it to JSON as
    null. Objects are small, medium or large by the `area` of their annotations. A split on which nothing
    is detected scores 0.

    Args:
        split: the annotations to score against.
        detections: by image id, boxes in pixels of the original image; an image that is missing has none.

    Raises:
        InputError: a detection has a category or an image that the split does not know.
        ValueError: boxes or scores are not finite.
    """
    evaluation = _evaluation(split, detections)
    with _silence():
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {
        name: float("nan") if value < 0 else 100.0 * float(value)
        for name, value in zip(FIGURES, evaluation.stats, strict=True)
    }


def score_session(
    session: Session, split: DetectionSplit, images: LetterboxedImages, preprocess: Preprocess
) -> tuple[dict[str, float], dict[int, Detections]]:
    """Run every image of a split through a session, one at a time, and score what it finds.

    Returns:
        The 12 figures of `coco_figures`, and the detections by image id in pixels of the original images.
    """
    detections = detected(session.run, split, images, preprocess)
    return coco_figures(split, detections), detections


def detected(
    run: Callable[[NDArray[np.float32]], Detections],
    split: DetectionSplit,
    images: LetterboxedImages,
    preprocess: Preprocess,
) -> dict[int, Detections]:
    """What is found on each image of a split, by its id, in pixels of the original.

    Args:
        run: as `Session.run`.
        split: all of `images`, or a part of them.
    """
    places = {int(image_id): place for place, image_id in enumerate(images.image_ids)}
    found = {}
    for image in split.images:
        place = places[image.id]
        inputs = network_input(images.pixels[place : place + 1], preprocess)
        found[image.id] = to_original(run(inputs), images.scales[place])
    return found


def to_original(found: Detections, scale: NDArray[np.float64]) -> Detections:
    """Detections on a letterboxed image as detections on the original; `scale` `(2,)` is that of x and y.

    Boxes are not cut at the borders of the image: what is scored is what the file returns. (Cutting adds
    0.14 AP to the published YOLOX-nano on 164 images of COCO, a gift that its users would not get.)
    """
    boxes = (found.boxes.reshape(-1, 4) / np.tile(scale, 2).astype(np.float32)).astype(np.float32)
    return Detections(boxes=boxes, scores=found.scores, labels=found.labels)


def map_difference_interval(
    split: DetectionSplit,
    detections_a: Mapping[int, Detections],
    detections_b: Mapping[int, Detections],
    resamples: int = 500,
    seed: int = 0,
) -> tuple[float, float, float]:
    """How much higher the mAP of `a` is than that of `b`, with the 95 % interval over images.

    A paired bootstrap (Efron 1979, percentile interval): both are scored on the same images drawn with
    replacement, so that what is hard about an image cancels. Detections are matched once.

    Returns:
        Difference on the split itself, and the 2.5 and 97.5 percentiles of that on the resamples.

    Raises:
        InputError, ValueError: as `coco_figures`.
    """
    a, b = category_matches(split, detections_a), category_matches(split, detections_b)
    return difference_interval(a, b, len(split.images), resamples, seed)


def category_matches(split: DetectionSplit, detections: Mapping[int, Detections]) -> list[CategoryMatches]:
    """pycocotools' own matching of detections to objects of all sizes, for each category.

    Images are counted in the order of their ids.
    """
    evaluation = _evaluation(split, detections)
    evaluation.params.areaRng = evaluation.params.areaRng[:1]
    evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[:1]
    evaluation.params.maxDets = evaluation.params.maxDets[-1:]
    with _silence():
        evaluation.evaluate()
    count = len(split.images)
    rows: list[dict[str, Any] | None] = evaluation.evalImgs
    thresholds = len(evaluation.params.iouThrs)
    return [_category(rows[start : start + count], thresholds) for start in range(0, len(rows), count)]


def _category(rows: Sequence[dict[str, Any] | None], thresholds: int) -> CategoryMatches:
    objects = np.zeros(len(rows), dtype=np.int64)
    images: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
    scores: list[NDArray[np.float64]] = [np.zeros(0)]
    matched: list[NDArray[np.bool_]] = [np.zeros((thresholds, 0), dtype=bool)]
    ignored: list[NDArray[np.bool_]] = [np.zeros((thresholds, 0), dtype=bool)]
    for position, row in enumerate(rows):
        if row is not None:
            objects[position] = np.count_nonzero(row["gtIgnore"] == 0)
            images.append(np.full(len(row["dtScores"]), position))
            scores.append(np.asarray(row["dtScores"], dtype=np.float64))
            matched.append(row["dtMatches"] > 0)
            ignored.append(row["dtIgnore"].astype(bool))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    counted = ~np.concatenate(ignored, axis=1)[:, order]
    return CategoryMatches(
        images=np.concatenate(images)[order],
        hits=np.concatenate(matched, axis=1)[:, order] & counted,
        counted=counted,
        objects=objects,
    )


def _evaluation(split: DetectionSplit, detections: Mapping[int, Detections]) -> Any:
    """A COCOeval that has both sides indexed. `COCO.loadRes` is not used: it fails without detections."""
    truth, found = COCO(), COCO()
    truth.dataset = split.coco()
    found.dataset = {**truth.dataset, "annotations": _as_annotations(split, detections)}
    with _silence():
        truth.createIndex()
        found.createIndex()
    return COCOeval(truth, found, "bbox")


def _as_annotations(split: DetectionSplit, detections: Mapping[int, Detections]) -> list[dict[str, Any]]:
    images = {image.id for image in split.images}
    categories = np.array([category.id for category in split.categories])
    rows: list[dict[str, Any]] = []
    for image_id, found in detections.items():
        if image_id not in images:
            raise InputError("detections: image id", image_id, f"no such image in {split.source}")
        unknown = found.labels[~np.isin(found.labels, categories)]
        if unknown.size:
            raise InputError(
                "detections: category id",
                int(unknown[0]),
                f"unknown in {split.source}; was the model made for other data?",
            )
        boxes, scores = found.boxes.astype(np.float64).reshape(-1, 4), found.scores.astype(np.float64)
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise ValueError(f"detections on image {image_id} hold NaN or infinite values")
        sides = boxes[:, 2:] - boxes[:, :2]
        for corner, side, score, label in zip(
            boxes[:, :2].tolist(), sides.tolist(), scores.tolist(), found.labels.tolist(), strict=True
        ):
            rows.append(
                {
                    "id": len(rows) + 1,
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": [*corner, *side],
                    "area": side[0] * side[1],
                    "iscrowd": 0,
                    "score": score,
                }
            )
    return rows


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """pycocotools prints its progress and has no switch for it."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
