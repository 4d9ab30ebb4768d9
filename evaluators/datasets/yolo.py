"""Data sets in the YOLO layout: `data.yaml` and a text file of boxes beside each image's folder.

A line of such a file is `class cx cy w h`, normalised by the image's width and height, or
`class x1 y1 x2 y2 x3 y3 ...`, a polygon, of which the bounding box is taken; where `data.yaml` has a
`kpt_shape`, it is `class cx cy w h` and key points, which are left out. Category ids are the class numbers.
An image without a text file has no objects.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from PIL import ExifTags, Image

from evaluators.datasets.split import (
    DetectionSplit,
    ImageRecord,
    check_box,
    checked_split,
    without_area,
)
from spaces.detectors.base import Category
from spaces.errors import InputError

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_FILES = ("data.yaml", "data.yml")


def has_yaml(root: Path) -> bool:
    """Whether this is a YOLO data set: a folder with a `data.yaml`, or such a file itself."""
    return (
        root.suffix in (".yaml", ".yml") if root.is_file() else any((root / one).is_file() for one in _FILES)
    )


def find_yaml(root: Path) -> Path:
    """The `data.yaml` of a data set, given its folder or the file itself.

    Raises:
        InputError: there is none.
    """
    if root.is_file():
        return root
    for name in _FILES:
        if (root / name).is_file():
            return root / name
    raise InputError("data", str(root), "has no data.yaml")


def split_names(source: Path) -> list[str]:
    """The splits that a `data.yaml` names: all keys whose value is a path or a list of paths."""
    other = {"path", "names", "nc", "download", "roboflow", "kpt_shape", "flip_idx"}
    return [
        key
        for key, value in _document(source).items()
        if isinstance(key, str) and key not in other and value and isinstance(value, str | list)
    ]


def read_yolo(source: Path, name: str, role: str) -> DetectionSplit:
    """Read one split. Images are numbered from 1 in the order of their paths, annotations as they come.

    Raises:
        InputError: a file or a line is not as it must be; the line says which and what.
    """
    document = _document(source)
    categories = _categories(source, document)
    classes = len(categories)
    images: list[ImageRecord] = []
    annotations: list[dict[str, Any]] = []
    for number, path in enumerate(_image_paths(source, document, name), start=1):
        image = ImageRecord(number, path, *_checked_size(path))
        images.append(image)
        for box, class_number in _boxes(image, classes, pose=bool(document.get("kpt_shape"))):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": class_number, "bbox": box}
            )
    return checked_split(role, name, source, images, categories, annotations)


def _document(source: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(source.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError("data.yaml", str(source), f"cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError("data.yaml", str(source), f"is no YAML file ({reason})") from None
    if not isinstance(document, dict):
        raise InputError("data.yaml", str(source), "must map names, train and val to their values")
    return document


def _categories(source: Path, document: dict[str, Any]) -> list[Category]:
    names = document.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if isinstance(names, dict) and all(isinstance(key, str) and key.isdecimal() for key in names):
        names = {int(key): name for key, name in names.items()}
    if not isinstance(names, dict) or not names:
        raise InputError(f"{source}: names", names, "list the class names in the order of their numbers")
    if sorted(names, key=str) != sorted(range(len(names)), key=str):
        raise InputError(f"{source}: names", list(names), "classes must be numbered from 0 without a gap")
    return [Category(number, str(names[number])) for number in range(len(names))]


def _image_paths(source: Path, document: dict[str, Any], name: str) -> list[Path]:
    entries = document.get(name)
    entries = entries if isinstance(entries, list) else [entries]
    found: list[Path] = []
    for entry in entries:
        if not isinstance(entry, str) or not entry:
            raise InputError(
                f"{source}: {name}", entry, "must be a folder of images or a text file that lists them"
            )
        path = _resolve(source, document, entry, name)
        if path.is_dir():
            found.extend(sorted(filter(_is_image, path.rglob("*"))))
        else:
            found.extend(_listed(path))
    seen: set[Path] = set()
    for path in found:
        if path in seen:
            raise InputError(f"{source}: {name}", str(path), "the image is listed twice; list it once")
        seen.add(path)
    return sorted(found)


def _is_image(path: Path) -> bool:
    """By its name; `._a.jpg` is what macOS keeps beside `a.jpg` on foreign disks."""
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")


def _resolve(source: Path, document: dict[str, Any], entry: str, name: str) -> Path:
    base = source.parent / str(document.get("path") or "")
    # Roboflow writes `../train/images` and means a folder beside data.yaml.
    tried = [base / entry, source.parent / entry, source.parent / entry.removeprefix("../")]
    for path in tried:
        if path.exists():
            return path
    raise InputError(
        f"{source}: {name}", entry, f"no such folder or file; looked at {tried[0]} and {tried[1]}"
    )


def _listed(path: Path) -> list[Path]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError):
        raise InputError(
            "image list", str(path), "must be a text file with the path of an image a line"
        ) from None
    images = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            image = path.parent / line.strip()
            if not image.is_file():
                raise InputError(f"{path}:{number}", line.strip(), f"no such image; looked at {image}")
            images.append(image)
    return images


def _checked_size(path: Path) -> tuple[int, int]:
    """Width and height. An EXIF orientation is refused: tools disagree on which way its boxes lie."""
    try:
        with Image.open(path) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            size = image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError("image", str(path), f"cannot be decoded ({reason}); replace or remove it") from None
    if orientation not in (0, 1):
        raise InputError(
            "image", str(path), f"has the EXIF orientation {orientation}; turn its pixels and remove the tag"
        )
    return size


def _label_path(image: Path) -> Path:
    """`.../images/a/b.jpg` has its boxes in `.../labels/a/b.txt`, any other image beside itself."""
    parts = list(image.parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _boxes(image: ImageRecord, classes: int, pose: bool) -> list[tuple[list[float], int]]:
    """Boxes xywh in pixels with their class numbers; of poses the boxes alone, without the key points."""
    path = _label_path(image.path)
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError):
        raise InputError("labels", str(path), "cannot be read as text") from None
    boxes = []
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields:
            continue
        where = f"{path}:{number}"
        try:
            values = [float(field) for field in fields]
        except ValueError:
            raise InputError(where, line, "must be numbers: class cx cy w h") from None
        values = values[:5] if pose else values
        if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
            raise InputError(where, line, "must be class cx cy w h, or class and the points of a polygon")
        if values[0] not in range(classes):
            raise InputError(
                f"{where}: class", fields[0], f"unknown category; data.yaml names 0 to {classes - 1}"
            )
        box = _box(values[1:], image.width, image.height)
        if not without_area(box):
            check_box(where, box, image.width, image.height)
        boxes.append((box, int(values[0])))
    return boxes


def _box(values: list[float], width: int, height: int) -> list[float]:
    if len(values) == 4:
        cx, cy, w, h = values
        return [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
    xs, ys = values[::2], values[1::2]
    return [min(xs) * width, min(ys) * height, (max(xs) - min(xs)) * width, (max(ys) - min(ys)) * height]
