"""Images decoded and letterboxed once, then shared by all processes through a memory map."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from evaluators.datasets.split import DetectionSplit, ImageRecord, clipped, is_object
from spaces.detectors.base import Labels, Preprocess
from spaces.errors import InputError

Progress = Callable[[int, int], None]
"""Called with images done and images in all."""

Fit = Literal["letterbox", "stretch"]
"""How images are brought to the size of the input; see `Preprocess`."""

_CACHE_VERSION = 2


def letterbox(
    image: NDArray[np.uint8], size: tuple[int, int], pad_value: int, fit: Fit = "letterbox"
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Scale an image to fit, keeping its aspect, and place it at the top left.

    Args:
        image: `(h, w, 3)` uint8.
        size: height and width of the result in pixels; smaller images are enlarged.
        pad_value: fills what is left at the bottom or on the right.
        fit: `stretch` scales each side by itself, so that nothing is left to fill.

    Returns:
        Pixels `(H, W, 3)` uint8, and the scales `(2,)` of x and y: a point of the image times them is its
        place in the result (up to half a pixel, since the scaled size is rounded to whole pixels).
    """
    (height, width), (h, w) = size, image.shape[:2]
    down, across = height / h, width / w
    if fit == "letterbox":
        down = across = min(down, across)
    fitted_h, fitted_w = (max(1, min(height, round(h * down))), max(1, min(width, round(w * across))))
    if (fitted_h, fitted_w) != (h, w):
        resized = Image.fromarray(image).resize((fitted_w, fitted_h), Image.Resampling.BILINEAR)
        image = np.asarray(resized)
    canvas = np.full((height, width, 3), pad_value, dtype=np.uint8)
    canvas[:fitted_h, :fitted_w] = image
    return canvas, np.array((across, down))


def network_input(pixels: NDArray[np.uint8], preprocess: Preprocess) -> NDArray[np.float32]:
    """Letterboxed RGB pixels `(N, H, W, 3)` uint8 as a network takes them, `(N, 3, H, W)` float32."""
    ordered = pixels if preprocess.channel_order == "RGB" else pixels[..., ::-1]
    images = np.ascontiguousarray(ordered.transpose(0, 3, 1, 2), dtype=np.float32)
    if preprocess.scale != 1.0:
        images *= np.float32(preprocess.scale)
    if any(preprocess.mean):
        images -= np.asarray(preprocess.mean, dtype=np.float32)[:, None, None]
    if any(value != 1.0 for value in preprocess.std):
        images /= np.asarray(preprocess.std, dtype=np.float32)[:, None, None]
    return images


def spread(total: int, count: int) -> NDArray[np.int64]:
    """Up to `count` positions among `total`, evenly spread, the first and the last one included."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64))


class LetterboxedImages:
    """The images of a split at one size. Pickles as paths, so that it travels to workers cheaply.

    Attributes:
        pixels: `(N, H, W, 3)` uint8 RGB, a read-only memory map.
        scales: `(N, 2)` float64, letterboxed pixels per original pixel, along x and y.
        image_ids: `(N,)` int64, in the order of `split.images`.
        split: where the images come from.
    """

    def __init__(self, split: DetectionSplit, folder: Path) -> None:
        self.split, self._folder = split, folder
        self._open()

    def _open(self) -> None:
        self.pixels: NDArray[np.uint8] = np.load(self._folder / "pixels.npy", mmap_mode="r")
        self.scales: NDArray[np.float64] = np.load(self._folder / "scales.npy")
        self.image_ids = np.array([image.id for image in self.split.images], dtype=np.int64)
        self._annotations = self.split.by_image()
        self._position = {category.id: place for place, category in enumerate(self.split.categories)}

    @classmethod
    def build(
        cls,
        split: DetectionSplit,
        size: tuple[int, int],
        pad_value: int,
        directory: Path,
        progress: Progress | None = None,
        fit: Fit = "letterbox",
    ) -> LetterboxedImages:
        """Open the cache of a split under `directory`, making it first where it is missing.

        A process that is killed while building leaves nothing that another would take for a cache; of
        several that ask at once, one builds and the others wait.

        Raises:
            InputError: an image cannot be decoded, its size is not what the annotations say, or the disk
                is too full.
        """
        folder = directory / _key(split, size, pad_value, fit)
        if not folder.is_dir():
            directory.mkdir(parents=True, exist_ok=True)
            with _lock(folder.with_suffix(".lock")):
                if not folder.is_dir():
                    _fill(folder, split, size, pad_value, progress, fit)
        return cls(split, folder)

    def __len__(self) -> int:
        return len(self.split.images)

    def labels(self, index: int) -> Labels:
        """What a network should find in image `index`: no crowd regions, no boxes without area."""
        image, scale = self.split.images[index], torch.from_numpy(self.scales[index]).float()
        objects = [one for one in self._annotations[image.id] if is_object(one)]
        boxes = [clipped(one["bbox"], image.width, image.height) for one in objects]
        classes = [self._position[one["category_id"]] for one in objects]
        return Labels(
            boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) * scale.repeat(2),
            classes=torch.tensor(classes, dtype=torch.int64),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"split": self.split, "_folder": self._folder.absolute()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def decode(image: ImageRecord) -> NDArray[np.uint8]:
    """The stored pixels of an image, `(h, w, 3)` uint8 RGB.

    EXIF orientation is not applied: COCO's and YOLO's boxes refer to the pixels as stored.

    Raises:
        InputError: the file is no image, or its size is not the one that the annotations give.
    """
    try:
        with Image.open(image.path) as file:
            if file.mode in ("F", "I"):  # PIL cuts at 255: white, or of floats up to 1 black
                raise ValueError(f"mode {file.mode} has no fixed range: save it with 8 or 16 bits a channel")
            if file.mode.startswith("I;16"):  # PIL would cut all but the darkest 256 of 65536 shades off
                grey = (np.asarray(file) // 257).astype(np.uint8)
                pixels = np.repeat(grey[:, :, None], 3, axis=2)
            else:
                pixels = np.asarray(file.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            "image", str(image.path), f"cannot be decoded ({reason}); replace or remove it"
        ) from None
    height, width = pixels.shape[:2]
    if (width, height) != (image.width, image.height):
        turned = " (turned by its EXIF tag? boxes must refer to the pixels as stored)"
        hint = turned if (height, width) == (image.width, image.height) else ""
        raise InputError(
            "image",
            str(image.path),
            f"has {width} x {height} pixels, its annotations say {image.width} x {image.height}{hint}; "
            "correct width and height there",
        )
    return pixels


def _key(split: DetectionSplit, size: tuple[int, int], pad_value: int, fit: Fit) -> str:
    """Names a cache by all that its content depends on, the files' lengths and times included."""
    digest = hashlib.sha256(f"{_CACHE_VERSION} {split.fingerprint()} {size} {pad_value} {fit}".encode())
    for image in split.images:
        stat = image.path.stat()
        digest.update(f"{image.id} {image.path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    name = re.sub(r"[^a-z0-9]+", "-", split.role.lower()).strip("-")
    return f"{name}-{size[0]}x{size[1]}-{digest.hexdigest()[:16]}"


def _fill(
    folder: Path,
    split: DetectionSplit,
    size: tuple[int, int],
    pad_value: int,
    progress: Progress | None,
    fit: Fit,
) -> None:
    draft = folder.with_suffix(".part")
    shutil.rmtree(draft, ignore_errors=True)  # of a builder that was killed: we hold the lock
    draft.mkdir()
    try:
        shape = (len(split.images), *size, 3)
        needed, free = int(np.prod(shape)), shutil.disk_usage(draft).free
        if needed > free:
            raise InputError(
                "cache", str(folder.parent), f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            )
        pixels = np.lib.format.open_memmap(draft / "pixels.npy", mode="w+", dtype=np.uint8, shape=shape)
        scales = np.empty((len(split.images), 2), dtype=np.float64)
        for index, image in enumerate(split.images):
            pixels[index], scales[index] = letterbox(decode(image), size, pad_value, fit)
            if progress is not None:
                progress(index + 1, len(split.images))
        pixels.flush()
        np.save(draft / "scales.npy", scales)
        os.rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; the kernel frees it when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
