"""Random changes to training images, on letterboxed uint8 pixels and their boxes."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from evaluators.datasets.letterbox import LetterboxedImages
from spaces.detectors.base import Labels

Pixels = NDArray[np.uint8]
Boxes = NDArray[np.float32]


class Augment(BaseModel):
    """What may happen to a training image; the defaults change nothing.

    Attributes:
        flip: probability of a mirror image. 0 where left and right differ in meaning, as for digits.
        scale: range of the factor of size.
        translate: largest shift, as a share of the side.
        brightness: largest shift of all values, as a share of the full range.
        contrast: largest relative change of contrast.
        colour: largest relative change of one channel against the others.
        mosaic: probability that an image is composed of four.
        visible: share of a box that must stay in the picture for the box to stay.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    flip: float = Field(default=0.0, ge=0.0, le=1.0)
    scale: tuple[float, float] = (1.0, 1.0)
    translate: float = Field(default=0.0, ge=0.0, lt=1.0)
    brightness: float = Field(default=0.0, ge=0.0, le=1.0)
    contrast: float = Field(default=0.0, ge=0.0, lt=1.0)
    colour: float = Field(default=0.0, ge=0.0, lt=1.0)
    mosaic: float = Field(default=0.0, ge=0.0, le=1.0)
    visible: float = Field(default=0.5, ge=0.0, le=1.0)

    def without_mosaic(self) -> Augment:
        """The same, one picture at a time: for the last epochs, which should see what tests see."""
        return self.model_copy(update={"mosaic": 0.0})


def augmented(
    images: LetterboxedImages, index: int, rules: Augment, pad_value: int, random: np.random.Generator
) -> tuple[Pixels, Labels]:
    """Image `index`, changed at random: pixels `(H, W, 3)` uint8 RGB and what is left of its boxes."""
    if random.random() < rules.mosaic:
        others = random.integers(len(images), size=3)
        pixels, boxes, classes = _mosaic(images, [index, *others.tolist()], rules, pad_value, random)
    else:
        source, labels = images.pixels[index], images.labels(index)
        height, width = source.shape[:2]
        zoom = _zoom(rules, random)
        # What is enlarged may move as far as it hangs over; the centre stays where nothing moves.
        shift = random.uniform(-rules.translate, rules.translate, size=2) * (width, height)
        shift += (1 - zoom) * np.array((width, height)) / 2
        pixels = _placed(source, zoom, shift, (height, width), pad_value)
        boxes, kept = _moved(labels.boxes.numpy(), zoom, shift, (height, width), rules.visible)
        classes = labels.classes.numpy()[kept]
    if random.random() < rules.flip:
        pixels, width = pixels[:, ::-1], pixels.shape[1]
        boxes = np.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), axis=1)
    labels = Labels(torch.from_numpy(np.ascontiguousarray(boxes)), torch.from_numpy(classes))
    return _recoloured(pixels, rules, random), labels


def _mosaic(
    images: LetterboxedImages,
    indices: list[int],
    rules: Augment,
    pad_value: int,
    random: np.random.Generator,
) -> tuple[Pixels, Boxes, NDArray[np.int64]]:
    """Four pictures side by side, each filling its quarter from a random place on."""
    height, width = images.pixels.shape[1:3]
    canvas = np.empty((height, width, 3), dtype=np.uint8)
    x, y = (int(side * random.uniform(0.3, 0.7)) for side in (width, height))
    quarters = ((0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height))
    all_boxes, all_classes = [], []
    for index, (x1, y1, x2, y2) in zip(indices, quarters, strict=True):
        labels, zoom, size = images.labels(index), _zoom(rules, random), (y2 - y1, x2 - x1)
        room = np.array((size[1] - width * zoom, size[0] - height * zoom))
        shift = random.uniform(np.minimum(room, 0), np.maximum(room, 0))
        canvas[y1:y2, x1:x2] = _placed(images.pixels[index], zoom, shift, size, pad_value)
        boxes, kept = _moved(labels.boxes.numpy(), zoom, shift, size, rules.visible)
        all_boxes.append(boxes + np.array((x1, y1, x1, y1), dtype=np.float32))
        all_classes.append(labels.classes.numpy()[kept])
    return canvas, np.concatenate(all_boxes), np.concatenate(all_classes)


def _zoom(rules: Augment, random: np.random.Generator) -> float:
    low, high = rules.scale
    return float(np.exp(random.uniform(np.log(low), np.log(high))))


def _placed(source: Pixels, zoom: float, shift: Boxes, size: tuple[int, int], pad_value: int) -> Pixels:
    """The picture enlarged by `zoom`, its corner at `shift` (x, y), on a canvas of `size` (h, w)."""
    if zoom == 1.0 and not np.any(shift) and size == source.shape[:2]:
        return np.array(source)
    back = (1 / zoom, 0.0, -float(shift[0]) / zoom, 0.0, 1 / zoom, -float(shift[1]) / zoom)
    picture = Image.fromarray(source).transform(
        (size[1], size[0]),
        Image.Transform.AFFINE,
        back,
        Image.Resampling.BILINEAR,
        fillcolor=(pad_value, pad_value, pad_value),
    )
    return np.asarray(picture)


def _moved(
    boxes: Boxes, zoom: float, shift: Boxes, size: tuple[int, int], visible: float
) -> tuple[Boxes, NDArray[np.bool_]]:
    """Boxes after the same change, cut at the canvas, and which of the old ones are still there."""
    moved = boxes * np.float32(zoom) + np.tile(shift, 2).astype(np.float32)
    cut = np.clip(moved, 0, np.array((size[1], size[0], size[1], size[0]), dtype=np.float32))
    before = (moved[:, 2:] - moved[:, :2]).prod(axis=1)
    extent = cut[:, 2:] - cut[:, :2]
    kept = (extent.prod(axis=1) >= visible * before) & (extent.min(axis=1, initial=np.inf) >= 2)
    return cut[kept], kept


def _recoloured(pixels: Pixels, rules: Augment, random: np.random.Generator) -> Pixels:
    if not (rules.brightness or rules.contrast or rules.colour):
        return pixels
    gain = 1 + random.uniform(-rules.contrast, rules.contrast)
    gains = gain * (1 + random.uniform(-rules.colour, rules.colour, size=3))
    shift = 255 * random.uniform(-rules.brightness, rules.brightness)
    levels = np.arange(256)[:, None]
    table = np.clip(np.rint((levels - 128) * gains + 128 + shift), 0, 255).astype(np.uint8)  # (256, 3)
    return np.stack([table[:, c][pixels[..., c]] for c in range(3)], axis=-1)
