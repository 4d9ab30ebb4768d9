"""One role's images and boxes, checked once where they enter so that nothing later has to."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spaces.detectors.base import Category
from spaces.errors import InputError

TOLERANCE = 1.0
"""Pixels that a box may stick out of its image: annotation tools round, and COCO itself has such boxes."""


@dataclass(frozen=True)
class ImageRecord:
    """An image file; width and height are those of the stored pixels (EXIF orientation is not applied)."""

    id: int
    path: Path
    width: int
    height: int


@dataclass(frozen=True)
class DetectionSplit:
    """The images of one role with their annotations.

    Attributes:
        role: fit, select or report, or the name itself where a split was asked for by name.
        name: the annotations' name, `val` for `annotations/val.json`; `train[select 20%, seed 0]` for a
            part of it.
        source: the file that the annotations were read from, or the first of them.
        categories: sorted by id; a class position is an index into it.
        annotations: COCO annotations, boxes xywh in pixels of the original image exactly as in the
            source, crowd regions included.
        whole: name of the annotations that it is a part of; empty where it is all of them.
        others: what was joined to it: `135 images of train.json`.
    """

    role: str
    name: str
    source: Path
    images: tuple[ImageRecord, ...]
    categories: tuple[Category, ...]
    annotations: list[dict[str, Any]]
    whole: str = ""
    others: str = ""

    @property
    def origin(self) -> str:
        """Where it is from, for a person."""
        return f"{self.source} and {self.others}" if self.others else str(self.source)

    def coco(self) -> dict[str, Any]:
        """The split as a COCO instances document.

        Annotations are numbered anew from 1: pycocotools takes a match with annotation 0 for no match.
        """
        images = [
            {"id": image.id, "file_name": image.path.name, "width": image.width, "height": image.height}
            for image in self.images
        ]
        keys = ("image_id", "category_id", "bbox", "area", "iscrowd")
        annotations = [
            {"id": number, **{key: annotation[key] for key in keys}}
            for number, annotation in enumerate(self.annotations, start=1)
        ]
        categories = [{"id": category.id, "name": category.name} for category in self.categories]
        return {"images": images, "annotations": annotations, "categories": categories}

    def fingerprint(self) -> str:
        """A hash (16 hex digits) of all that scores depend on: images by name and size, boxes, categories.

        Where the data lie on the disk, their role and their order in the source do not matter.
        """
        document = self.coco()
        for annotation in document["annotations"]:
            del annotation["id"]
        canonical = {
            key: sorted(json.dumps(row, sort_keys=True) for row in document[key]) for key in document
        }
        return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()[:16]

    def by_image(self) -> dict[int, list[dict[str, Any]]]:
        """Annotations by image id; images without any have an empty list."""
        grouped: dict[int, list[dict[str, Any]]] = {image.id: [] for image in self.images}
        for annotation in self.annotations:
            grouped[annotation["image_id"]].append(annotation)
        return grouped

    @property
    def boxes_without_area(self) -> int:
        """How many boxes have no width or no height; see `without_area`."""
        return sum(without_area(annotation["bbox"]) for annotation in self.annotations)

    def part(self, role: str, name: str, keep: Callable[[ImageRecord], bool]) -> DetectionSplit:
        """The images that `keep` picks, with their annotations."""
        images = tuple(image for image in self.images if keep(image))
        ids = {image.id for image in images}
        annotations = [one for one in self.annotations if one["image_id"] in ids]
        split = checked_split(role, name, self.source, images, self.categories, annotations)
        return replace(split, whole=self.name)


def checked_split(
    role: str,
    name: str,
    source: Path,
    images: Iterable[ImageRecord],
    categories: Iterable[Category],
    annotations: list[dict[str, Any]],
) -> DetectionSplit:
    """A split whose ids are unique, whose references resolve and whose boxes lie in their images.

    Missing `area` becomes width times height, missing `iscrowd` 0.

    Raises:
        InputError: the first thing that is wrong, by file, id, field and value.
    """
    split = DetectionSplit(
        role, name, source, tuple(images), tuple(sorted(categories, key=lambda one: one.id)), annotations
    )
    sizes = _unique(source, "image", [(image.id, (image.width, image.height)) for image in split.images])
    known = _unique(source, "category", [(one.id, one.name) for one in split.categories])
    _unique(source, "annotation", [(one["id"], None) for one in annotations])
    misplaced: list[InputError] = []
    for annotation in annotations:
        where = f"{source}: annotation {annotation['id']}"
        if annotation["image_id"] not in sizes:
            raise InputError(f"{where}: image_id", annotation["image_id"], "no such image in this file")
        if annotation["category_id"] not in known:
            raise InputError(
                f"{where}: category_id",
                annotation["category_id"],
                f"unknown category; known are {_few(known)}",
            )
        try:
            if not without_area(annotation["bbox"]):
                check_box(where, annotation["bbox"], *sizes[annotation["image_id"]])
        except InputError as error:
            misplaced.append(error)
            continue
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    if misplaced:
        first, more = misplaced[0], len(misplaced) - 1
        others = f" ({more} more of this file cannot be used, either)" if more else ""
        raise InputError(first.field, first.value, first.remedy + others)
    if not split.images:
        raise InputError(f"{role} data", str(source), "the split is empty; it needs at least one image")
    if not any(map(is_object, annotations)):
        raise InputError(
            f"{role} data", str(source), f"the split is empty: {name} has no box to learn or score"
        )
    return split


def joined(split: DetectionSplit, other: DetectionSplit) -> DetectionSplit:
    """The images of both, in the role of the first, whose categories both have and whose source it names.

    Annotations are numbered anew from 1, and so are images where one has the id of another.
    """
    parts = (split, other)
    ids = [image.id for part in parts for image in part.images]
    keep = len(set(ids)) == len(ids)
    images: list[ImageRecord] = []
    annotations: list[dict[str, Any]] = []
    for part in parts:
        first = len(images) + 1
        new = {one.id: one.id if keep else number for number, one in enumerate(part.images, start=first)}
        images += [replace(image, id=new[image.id]) for image in part.images]
        annotations += [{**one, "image_id": new[one["image_id"]]} for one in part.annotations]
    numbered = [{**one, "id": number} for number, one in enumerate(annotations, start=1)]
    return replace(
        split,
        name=f"{split.name} + {other.name}",
        images=tuple(images),
        annotations=numbered,
        others=f"{len(other.images)} images of {other.source.name}",
    )


def refused(field: str, value: Any, remedy: str) -> InputError:
    """The error of a value that a file has; null, too, is shown."""
    return InputError(field, value, remedy if value is not None else f"is null; {remedy}")


def is_finite(number: float) -> bool:
    """True for what a float can hold; JSON has whole numbers of any length.

    Raises:
        TypeError: it is no number.
    """
    return abs(number) <= sys.float_info.max


def without_area(box: Any) -> bool:
    """True for a box of no width or no height, of which COCO's own train2017 has two.

    It stays where it is for scoring, as pycocotools counts it; nothing can be learnt from it.
    """
    try:
        return all(map(is_finite, box)) and len(box) == 4 and min(box[2:]) == 0
    except TypeError:
        return False


def is_object(annotation: dict[str, Any]) -> bool:
    """True for what a network should find: no crowd region, and a box with an area."""
    return not annotation["iscrowd"] and not without_area(annotation["bbox"])


def clipped(box: list[float], width: float, height: float) -> tuple[float, float, float, float]:
    """A box xywh as xyxy, cut at the borders of its image."""
    x, y, w, h = box
    return max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))


def check_box(where: str, box: Any, width: int, height: int) -> None:
    """Raise InputError unless `box` is xywh in pixels with an area inside its image.

    It may stick out by `TOLERANCE`: it stays as it is for scoring, and labels for training are clipped.
    """
    if not (isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) for v in box)):
        raise refused(f"{where}: bbox", box, "must be four numbers: x, y, width, height")
    if not all(map(is_finite, box)):
        raise InputError(f"{where}: bbox", box, "must be finite numbers; correct or remove it")
    x, y, w, h = box
    if w <= 0 or h <= 0:
        raise InputError(f"{where}: bbox", box, "has no area; width and height must be above 0")
    beyond = max(-x, -y, x + w - width, y + h - height)
    if beyond > TOLERANCE:
        raise InputError(
            f"{where}: bbox",
            box,
            f"lies outside the image of {width} x {height} pixels by {beyond:.4g}, where {TOLERANCE:g} is "
            "rounding; correct or remove it",
        )
    x1, y1, x2, y2 = clipped(box, width, height)
    if x2 <= x1 or y2 <= y1:
        raise InputError(f"{where}: bbox", box, f"has no area inside the image of {width} x {height} pixels")


def _unique(source: Path, kind: str, rows: list[tuple[int, Any]]) -> dict[int, Any]:
    seen: dict[int, Any] = {}
    for key, value in rows:
        if key in seen:
            raise InputError(
                f"{source}: {kind} id", key, f"is used twice; every {kind} needs an id of its own"
            )
        seen[key] = value
    return seen


def _few(known: dict[int, Any], limit: int = 10) -> str:
    ids = sorted(known)
    return ", ".join(map(str, ids[:limit])) + (f" and {len(ids) - limit} more" if len(ids) > limit else "")
