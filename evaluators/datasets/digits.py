"""The embedded data set: real handwritten digits on photographs and textures, written as COCO files.

Everything comes from what scikit-learn ships, so it needs no network: the 1797 digits of `load_digits`
(8x8 pixels, UCI Optical Recognition of Handwritten Digits) and the two photographs of
`load_sample_images`. The three roles share neither a source digit nor a pixel of background photograph.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evaluators.datasets.digits_canvas import IMAGE_SIZE, compose
from spaces.errors import InputError

VERSION = 1
"""Goes up whenever the same seed would give other pixels or boxes."""

MARKER = "digits.json"
IMAGES = {"fit": 600, "select": 150, "report": 300}
_SHARES = {"fit": 0.6, "select": 0.15, "report": 0.25}
_TILE = 128  # pixels; the photographs are cut into squares, each belonging to one role
# Dealt to the tiles in turn, so that every role sees sky, walls and petals: 9 fit, 2 select, 4 report.
_DEAL = {"f": "fit", "s": "select", "r": "report"}
_TILE_ROLES = [_DEAL[letter] for letter in "ffrfsffrffrfsfr"]

CATEGORIES = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
"""Ids are not positions (digit 0 has id 1), so that a mix-up of the two cannot pass unnoticed."""


def write_digits(directory: Path, seed: int = 0, images: Mapping[str, int] | None = None) -> Path:
    """Write the data set unless it is there already, and return its folder.

    The layout is `images/*.png` (160x160 RGB) and `annotations/{fit,select,report}.json`. The same seed
    gives the same bytes. A folder made by this function with other arguments, or by an older version, is
    replaced. The folder appears complete or not at all, and several processes may ask for it at once.

    Args:
        directory: the folder to make; its parents are made, too.
        seed: which digits go to which role, and all that is drawn with them.
        images: number of images by role; 600 fit, 150 select and 300 report by default.

    Raises:
        InputError: the folder holds something that this function did not write.
    """
    counts = dict(IMAGES if images is None else images)
    if set(counts) != set(IMAGES) or min(counts.values()) < 1:
        raise InputError("images", counts, f"give at least one image for each of {', '.join(IMAGES)}")
    marker = {"version": VERSION, "seed": seed, "images": counts}
    if _marker_of(directory) == marker:
        return directory
    if (
        directory.exists()
        and _marker_of(directory) is None
        and (not directory.is_dir() or any(directory.iterdir()))
    ):
        remedy = (
            "not a digits data set; write data.format: auto to read it, or name a new folder for the digits"
        )
        raise InputError("data.root", str(directory), remedy)
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        _write_all(draft, seed, counts)
        (draft / MARKER).write_text(json.dumps(marker))
        draft.chmod(0o755)
        _put_in_place(draft, directory, marker)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return directory


def partition(seed: int) -> dict[str, NDArray[np.int64]]:
    """Indices into `load_digits()` by role: disjoint, together all 1797, each class split alike."""
    random = np.random.RandomState(seed % 2**32)
    classes = _sources()[1]
    parts: dict[str, list[int]] = {role: [] for role in IMAGES}
    for digit in range(10):
        members = random.permutation(np.flatnonzero(classes == digit))
        first = round(len(members) * _SHARES["fit"])
        second = first + round(len(members) * _SHARES["select"])
        for role, indices in zip(IMAGES, np.split(members, [first, second]), strict=True):
            parts[role].extend(indices.tolist())
    return {role: np.array(sorted(indices), dtype=np.int64) for role, indices in parts.items()}


def _marker_of(directory: Path) -> dict[str, Any] | None:
    try:
        marker = json.loads((directory / MARKER).read_text())
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) else None


def _put_in_place(draft: Path, directory: Path, marker: dict[str, Any]) -> None:
    for _ in range(3):
        try:
            os.rename(draft, directory)  # fails where a non-empty folder stands
            return
        except OSError:
            if _marker_of(directory) == marker:  # another process was faster
                return
            old = Path(tempfile.mkdtemp(prefix=f".{directory.name}-old-", dir=directory.parent))
            os.rename(directory, old)
            shutil.rmtree(old)
    raise InputError("root", str(directory), "keeps being rewritten by another process; name another folder")


def _write_all(directory: Path, seed: int, counts: Mapping[str, int]) -> None:
    (directory / "images").mkdir()
    (directory / "annotations").mkdir()
    digits, classes = _sources()
    pools, next_image, next_annotation = partition(seed), 1, 1
    for position, (role, count) in enumerate(counts.items()):
        # RandomState, not Generator: its stream is frozen across NumPy versions, so are the data.
        random = np.random.RandomState((seed * 1000 + position) % 2**32)
        tiles = _tiles(role)
        queue: list[int] = []
        records: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            tile = random.randint(len(tiles))
            wanted = random.randint(1, 9)
            if len(queue) < wanted:
                queue = [*queue, *random.permutation(pools[role]).tolist()]
            drawn, queue = queue[:wanted], queue[wanted:]
            pixels, placed = compose(random, tiles[tile], [digits[source] for source in drawn])
            name = f"{role}_{index:04d}.png"
            Image.fromarray(pixels).save(directory / "images" / name, compress_level=4)
            height, width = pixels.shape[:2]
            records.append(
                {"id": next_image, "file_name": name, "width": width, "height": height, "tile": tile}
            )
            for which, (x1, y1, x2, y2) in placed:
                annotations.append(
                    {
                        "id": next_annotation,
                        "image_id": next_image,
                        "category_id": CATEGORIES[classes[drawn[which]]]["id"],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": 0,
                        "segmentation": [],
                        "source_digit": drawn[which],
                    }
                )
                next_annotation += 1
            next_image += 1
        document = {
            "info": {"description": "handwritten digits of scikit-learn", "version": VERSION, "seed": seed},
            "images": records,
            "annotations": annotations,
            "categories": CATEGORIES,
        }
        (directory / "annotations" / f"{role}.json").write_text(json.dumps(document))


@lru_cache(maxsize=1)
def _sources() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Ink `(1797, 8, 8)` in 0..1 and classes `(1797,)`."""
    from sklearn.datasets import load_digits  # here, because every worker would wait for it

    bunch = load_digits()
    return (bunch.images / 16.0).astype(np.float32), bunch.target.astype(np.int64)


def _tiles(role: str) -> list[NDArray[np.uint8]]:
    """The squares of the two photographs, `(128, 128, 3)`, that belong to a role."""
    from sklearn.datasets import load_sample_images

    tiles = []
    for photograph in load_sample_images().images:
        rows, columns = photograph.shape[0] // _TILE, photograph.shape[1] // _TILE
        for number in range(rows * columns):
            if _TILE_ROLES[number % len(_TILE_ROLES)] == role:
                y, x = _TILE * (number // columns), _TILE * (number % columns)
                tiles.append(photograph[y : y + _TILE, x : x + _TILE])
    return tiles


__all__ = ["CATEGORIES", "IMAGES", "IMAGE_SIZE", "VERSION", "partition", "write_digits"]
