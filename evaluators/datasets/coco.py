"""Data sets in the COCO instances format (https://cocodataset.org/#format-data)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from evaluators.datasets.split import DetectionSplit, ImageRecord, checked_split, is_finite, refused
from spaces.detectors.base import Category
from spaces.errors import InputError

IMAGE_IDS, CATEGORY_IDS = 2**63, 2**31
"""Ids must be below, and not below minus that: arrays hold those of images, OpenVINO's outputs those of
categories, in as many bits.
"""
SIDES = 2**31
"""Widths and heights must be below: no image format has larger ones."""


def annotation_files(root: Path) -> dict[str, Path]:
    """The annotations of a data set by name: `val` or `instances_val2017`."""
    return {path.stem: path for path in sorted((root / "annotations").glob("*.json"))}


def read_coco(root: Path, source: Path, role: str) -> DetectionSplit:
    """Read one annotations file.

    An image is looked for, in this order, in `images/`, in `images/NAME/`, in `NAME/` and in the root,
    NAME being that of the annotations without `instances_` (`train2017/` for `instances_train2017.json`).
    Crowd regions are kept: scoring ignores detections on them, training leaves them out.

    Raises:
        InputError: the file or something in it is not as it must be; the line says which and what.
    """
    document = _read_json(source)
    name = source.stem
    folders = [
        root / "images",
        root / "images" / name.removeprefix("instances_"),
        root / name.removeprefix("instances_"),
        root,
    ]
    images = [
        ImageRecord(
            id=_id(source, "image", position, row, IMAGE_IDS),
            path=_find_image(source, _text(source, "image", position, row, "file_name"), folders),
            width=_side(source, position, row, "width"),
            height=_side(source, position, row, "height"),
        )
        for position, row in enumerate(_rows(source, document, "images"))
    ]
    categories = [
        Category(
            id=_id(source, "category", position, row, CATEGORY_IDS),
            name=_text(source, "category", position, row, "name"),
        )
        for position, row in enumerate(_rows(source, document, "categories"))
    ]
    annotations = [
        _annotation(source, position, row)
        for position, row in enumerate(_rows(source, document, "annotations"))
    ]
    return checked_split(role, name, source, images, categories, annotations)


def _annotation(source: Path, position: int, row: dict[str, Any]) -> dict[str, Any]:
    for key in ("id", "image_id", "category_id"):
        _integer(source, "annotation", position, row, key)
    if "bbox" not in row:
        raise InputError(f"{source}: annotation {row['id']}", None, "has no bbox")
    annotation = {key: value for key, value in row.items() if key != "segmentation"}
    if annotation.get("iscrowd", 0) not in (0, 1):
        raise refused(f"{source}: annotation {row['id']}: iscrowd", annotation["iscrowd"], "must be 0 or 1")
    area = annotation.get("area", 0.0)
    if type(area) not in (int, float) or not is_finite(area) or area < 0:
        raise refused(f"{source}: annotation {row['id']}: area", area, "must be a number of at least 0")
    return annotation


def _read_json(source: Path) -> dict[str, Any]:
    try:
        document = json.loads(source.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError("annotations", str(source), f"cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError("annotations", str(source), f"is no complete JSON file ({reason})") from None
    if not isinstance(document, dict):
        raise InputError(
            "annotations", str(source), "is no COCO instances file: an object is expected at the top"
        )
    return document


def _rows(source: Path, document: dict[str, Any], key: str) -> list[dict[str, Any]]:
    rows = document.get(key)
    if not isinstance(rows, list):
        raise InputError(
            f"{source}: {key}", None, "is missing or no list; see https://cocodataset.org/#format-data"
        )
    for position, row in enumerate(rows):
        if not isinstance(row, dict):
            raise refused(f"{source}: {key}[{position}]", row, "must be an object")
    return rows


def _name(kind: str, position: int, row: dict[str, Any], key: str) -> str:
    """How to point at a row: by its id where it has one, by its position otherwise."""
    return f"{kind} {row['id']}" if key != "id" and "id" in row else f"{kind} at position {position}"


def _integer(
    source: Path, kind: str, position: int, row: dict[str, Any], key: str, least: int | None = None
) -> int:
    value = row.get(key)
    where = f"{source}: {_name(kind, position, row, key)}"
    if key not in row:
        raise InputError(where, None, f"has no {key}")
    if type(value) is not int or (least is not None and value < least):
        above = "" if least is None else f" of at least {least}"
        raise refused(f"{where}: {key}", value, f"must be a whole number{above}")
    return value


def _side(source: Path, position: int, row: dict[str, Any], key: str) -> int:
    """The width or height of an image, pixels."""
    value = _integer(source, "image", position, row, key, least=1)
    if value >= SIDES:
        where = f"{source}: {_name('image', position, row, key)}: {key}"
        raise InputError(where, value, f"must be below 2^{SIDES.bit_length() - 1}")
    return value


def _id(source: Path, kind: str, position: int, row: dict[str, Any], limit: int) -> int:
    value = _integer(source, kind, position, row, "id")
    if not -limit <= value < limit:
        raise InputError(
            f"{source}: {_name(kind, position, row, 'id')}: id",
            value,
            f"must be below 2^{limit.bit_length() - 1} in size; renumber them",
        )
    return value


def _text(source: Path, kind: str, position: int, row: dict[str, Any], key: str) -> str:
    where = f"{source}: {_name(kind, position, row, key)}"
    if key not in row:
        raise InputError(where, None, f"has no {key}")
    value = row[key]
    if not isinstance(value, str) or not value:
        raise refused(f"{where}: {key}", value, "must be a text")
    return value


def _find_image(source: Path, file_name: str, folders: list[Path]) -> Path:
    for folder in folders:
        path = folder / file_name
        if os.path.isfile(path):  # `Path.is_file` raises where a name is too long for the disk
            return path
    tried = ", ".join(str(folder) for folder in folders)
    raise InputError(f"{source}: file_name", file_name, f"no such image; looked in {tried}")
