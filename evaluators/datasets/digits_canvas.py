"""Drawing one image of the digits data set: a background, a few distracting strokes, then digits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

IMAGE_SIZE = 160
_HEIGHTS = (14.0, 64.0)  # pixels, of the 8x8 source scaled up; drawn log-uniformly
_CONTRAST = (0.16, 0.7)  # ink against its surroundings, in units of the full range
_OVERLAP = 0.1  # largest share of the smaller box that another box may cover
_VISIBLE = 0.3  # ink covers at least this much of a pixel that counts for the box
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)

Box = tuple[int, int, int, int]
Pixels = NDArray[np.float32]


def compose(
    random: np.random.RandomState, tile: NDArray[np.uint8], digits: Sequence[Pixels]
) -> tuple[NDArray[np.uint8], list[tuple[int, Box]]]:
    """Draw digits onto a background made from a tile of a photograph, or onto a texture.

    Args:
        random: the source of all that varies.
        tile: `(T, T, 3)` uint8 RGB.
        digits: `(8, 8)` float32 each, ink in 0..1.

    Returns:
        Pixels `(160, 160, 3)` uint8 RGB, and for each digit that found room its position in `digits`
        and its box xyxy in pixels, tight around the visible ink.
    """
    canvas = _texture(random) if random.rand() < 0.25 else _photograph(random, tile)
    canvas = _strokes(random, canvas)
    placed: list[tuple[int, Box]] = []
    for position, digit in enumerate(digits):
        ink = _ink(random, digit)
        height, width = ink.shape
        for _ in range(30):
            x, y = random.randint(IMAGE_SIZE - width + 1), random.randint(IMAGE_SIZE - height + 1)
            box = (x, y, x + width, y + height)
            if all(_covered(box, other) <= _OVERLAP for _, other in placed):
                _blend(random, canvas[y : y + height, x : x + width], ink)
                placed.append((position, box))
                break
    noise = random.standard_normal(canvas.shape).astype(np.float32) * np.float32(random.uniform(0.0, 9.0))
    return np.clip(np.rint(canvas + noise), 0, 255).astype(np.uint8), placed


def _photograph(random: np.random.RandomState, tile: NDArray[np.uint8]) -> Pixels:
    side = random.randint(64, tile.shape[0] + 1)
    y, x = random.randint(tile.shape[0] - side + 1), random.randint(tile.shape[1] - side + 1)
    crop = Image.fromarray(tile[y : y + side, x : x + side])
    pixels = np.asarray(crop.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC), dtype=np.float32)
    if random.rand() < 0.5:
        pixels = pixels[:, ::-1]
    contrast, shift = random.uniform(0.5, 1.2), random.uniform(-40, 40)
    mean = pixels.mean(axis=(0, 1), keepdims=True)
    pixels = (pixels - mean) * np.float32(contrast) + mean + np.float32(shift)
    return np.asarray(np.clip(pixels, 0, 255), dtype=np.float32)


def _texture(random: np.random.RandomState) -> Pixels:
    """Noise of several grain sizes between two colours."""
    field = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    for cells in (3, 8, 24, 80):
        grain = Image.fromarray(random.rand(cells, cells).astype(np.float32))
        field += np.asarray(grain.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)) * np.float32(
            random.rand()
        )
    field = (field - field.min()) / max(float(np.ptp(field)), 1e-6)
    low, high = random.uniform(20, 235, size=(2, 3)).astype(np.float32)
    return np.asarray(low + field[..., None] * (high - low), dtype=np.float32)


def _strokes(random: np.random.RandomState, canvas: Pixels) -> Pixels:
    """Lines and arcs that are no digits, so that a stroke alone is no evidence."""
    layer = Image.fromarray(canvas.astype(np.uint8))
    pen = ImageDraw.Draw(layer)
    for _ in range(random.randint(0, 6)):
        colour = tuple(int(c) for c in random.randint(0, 256, size=3))
        x, y = (int(v) for v in random.randint(0, IMAGE_SIZE, size=2))
        reach, width = int(random.randint(8, 48)), int(random.randint(1, 6))
        if random.rand() < 0.5:
            dx, dy = (int(v) for v in random.randint(-reach, reach + 1, size=2))
            pen.line((x, y, x + dx, y + dy), fill=colour, width=width)
        else:
            start = int(random.randint(0, 360))
            span = int(random.randint(60, 240))
            pen.arc((x, y, x + reach, y + reach), start, start + span, fill=colour, width=width)
    layer = layer.filter(ImageFilter.GaussianBlur(float(random.uniform(0.0, 1.2))))
    return np.array(layer, dtype=np.float32)


def _ink(random: np.random.RandomState, digit: Pixels) -> Pixels:
    """A digit scaled, slanted, sharpened, and trimmed to its visible ink: coverage `(h, w)` in 0..1."""
    height = float(np.exp(random.uniform(*np.log(_HEIGHTS))))
    width = height * float(np.exp(random.uniform(np.log(0.75), np.log(1.35))))
    source = Image.fromarray(np.pad(digit, 2))
    size = (max(8, round(width * 1.5)), max(8, round(height * 1.5)))  # 8 + 2 * 2 = 12 cells
    scaled = source.resize(size, Image.Resampling.BICUBIC)
    turned = scaled.rotate(float(random.uniform(-18, 18)), Image.Resampling.BICUBIC, expand=True)
    coverage = np.clip((np.asarray(turned, dtype=np.float32) - 0.35) / 0.4, 0.0, 1.0)
    rows = np.flatnonzero((coverage >= _VISIBLE).any(axis=1))
    columns = np.flatnonzero((coverage >= _VISIBLE).any(axis=0))
    trimmed: Pixels = coverage[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return trimmed


def _blend(random: np.random.RandomState, patch: Pixels, ink: Pixels) -> None:
    """Draw ink into a patch of the canvas, in place, in a colour that stands out by a drawn contrast."""
    around = float((patch.mean(axis=(0, 1)) * _LUMA).sum())
    step = 255.0 * float(random.uniform(*_CONTRAST))
    lighter = around + step <= 255.0 and (around - step < 0.0 or random.rand() < 0.5)
    tint = random.uniform(0, 255, size=3).astype(np.float32)
    tint -= (tint * _LUMA).sum()
    colour = np.clip(
        around + (step if lighter else -step) + np.float32(random.uniform(0, 0.6)) * tint, 0, 255
    )
    opacity = ink[..., None] * np.float32(random.uniform(0.8, 1.0))
    patch += opacity * (colour - patch)


def _covered(a: Box, b: Box) -> float:
    """The share of the smaller box that lies in the other."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
