"""Letterbox geometry, the network's input, and the cache that workers share."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from evaluators.datasets.letterbox import LetterboxedImages, decode, letterbox, network_input
from evaluators.datasets.split import DetectionSplit, ImageRecord, checked_split
from spaces.detectors.base import Category, Preprocess
from spaces.errors import InputError

RANDOM = np.random.RandomState(0)


def split_of(folder: Path, *sizes: tuple[int, int]) -> DetectionSplit:
    """Images of noise, (width, height) each, with a box on their right half and a crowd over all."""
    images, annotations = [], []
    for number, (width, height) in enumerate(sizes, start=1):
        path = folder / f"{number}.png"
        Image.fromarray(RANDOM.randint(0, 256, (height, width, 3)).astype(np.uint8)).save(path)
        images.append(ImageRecord(number * 10, path, width, height))
        for box, category, crowd in (([width / 2, 0, width / 2 + 0.5, height], 8, 0), ([0, 0, 5, 5], 4, 1)):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number * 10,
                    "category_id": category,
                    "bbox": box,
                    "iscrowd": crowd,
                }
            )
    categories = [Category(8, "b"), Category(4, "a")]
    return checked_split("fit", "train", folder / "train.json", images, categories, annotations)


def same(scale: NDArray[np.float64]) -> float:
    """The scale of both axes."""
    assert scale[0] == scale[1]
    return float(scale[0])


@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (100, 7), (7, 100), (3, 333), (64, 96), (1, 1)])
def test_the_image_fits_at_the_top_left_and_keeps_its_aspect(shape: tuple[int, int]) -> None:
    pixels, scale = letterbox(np.full((*shape, 3), 200, dtype=np.uint8), (64, 96), 114)
    assert pixels.shape == (64, 96, 3)
    scale = same(scale)
    assert scale == min(64 / shape[0], 96 / shape[1])
    filled = (pixels == 200).all(axis=2)
    rows, columns = int(filled.any(axis=1).sum()), int(filled.any(axis=0).sum())
    assert filled[:rows, :columns].all()
    assert (pixels[~filled] == 114).all()
    assert abs(rows - max(1, shape[0] * scale)) <= 0.5
    assert abs(columns - max(1, shape[1] * scale)) <= 0.5


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    image = RANDOM.randint(0, 256, (64, 50, 3)).astype(np.uint8)
    pixels, scale = letterbox(image, (64, 96), 0)
    assert same(scale) == 1.0
    np.testing.assert_array_equal(pixels[:, :50], image)


def test_a_mark_lands_where_the_scale_says() -> None:
    image = np.zeros((200, 300, 3), dtype=np.uint8)
    image[120:160, 210:270] = 255  # xyxy 210, 120, 270, 160
    pixels, scale = letterbox(image, (64, 96), 0)
    rows = np.flatnonzero((pixels[..., 0] > 127).any(axis=1))
    columns = np.flatnonzero((pixels[..., 0] > 127).any(axis=0))
    seen = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    np.testing.assert_allclose(seen / np.tile(scale, 2), [210, 120, 270, 160], atol=1 / same(scale))


def test_a_stretched_image_fills_the_input(tmp_path: Path) -> None:
    image = np.zeros((200, 300, 3), dtype=np.uint8)
    image[120:160, 210:270] = 255
    pixels, scale = letterbox(image, (60, 150), 114, "stretch")
    assert scale.tolist() == [0.5, 0.3]  # x, y
    assert not (pixels == 114).all(axis=2).any()
    rows = np.flatnonzero((pixels[..., 0] > 127).any(axis=1))
    columns = np.flatnonzero((pixels[..., 0] > 127).any(axis=0))
    assert [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] == [105, 36, 135, 48]
    split = split_of(tmp_path, (40, 30))
    plain = LetterboxedImages.build(split, (32, 32), 0, tmp_path / "cache")
    stretched = LetterboxedImages.build(split, (32, 32), 0, tmp_path / "cache", fit="stretch")
    height, width = split.images[0].height, split.images[0].width
    boxes = [images.labels(0).boxes.numpy() / np.tile(images.scales[0], 2) for images in (plain, stretched)]
    np.testing.assert_allclose(boxes[0], boxes[1], rtol=1e-6)
    assert stretched.scales[0].tolist() == [32 / width, 32 / height]


def test_network_input_is_ordered_scaled_and_normalised() -> None:
    pixels = np.array([[[[10, 20, 30]]]], dtype=np.uint8)
    plain = network_input(pixels, Preprocess(size=(1, 1)))
    assert plain.dtype == np.float32
    assert plain.shape == (1, 3, 1, 1)
    assert plain.flatten().tolist() == [10, 20, 30]
    swapped = Preprocess(size=(1, 1), channel_order="BGR", scale=0.1, mean=(1, 2, 3), std=(2, 4, 5))
    # (pixel * scale - mean) / std, the mean and std in the network's own order: blue first.
    np.testing.assert_allclose(network_input(pixels, swapped).flatten(), [1.0, 0.0, -0.4], atol=1e-6)


def test_the_cache_holds_what_letterbox_makes(tmp_path: Path) -> None:
    split = split_of(tmp_path, (40, 30), (20, 64))
    calls: list[tuple[int, int]] = []
    images = LetterboxedImages.build(
        split, (32, 32), 7, tmp_path / "cache", lambda done, of: calls.append((done, of))
    )
    assert calls == [(1, 2), (2, 2)]
    assert len(images) == 2
    assert images.image_ids.tolist() == [10, 20]
    for index, image in enumerate(split.images):
        expected, scale = letterbox(np.asarray(Image.open(image.path)), (32, 32), 7)
        np.testing.assert_array_equal(images.pixels[index], expected)
        np.testing.assert_array_equal(images.scales[index], scale)
    with pytest.raises(ValueError, match="read-only"):
        images.pixels[0] = 0


def test_labels_are_scaled_clipped_positions_without_crowds(tmp_path: Path) -> None:
    images = LetterboxedImages.build(split_of(tmp_path, (40, 30)), (32, 32), 0, tmp_path / "cache")
    labels = images.labels(0)
    assert labels.classes.tolist() == [1]  # category 8 is the second by id
    np.testing.assert_allclose(labels.boxes.numpy(), [[16, 0, 32, 24]])  # half a pixel stuck out
    assert (str(labels.boxes.dtype), str(labels.classes.dtype)) == ("torch.float32", "torch.int64")


def test_boxes_without_area_are_no_labels(tmp_path: Path) -> None:
    split = split_of(tmp_path, (40, 30))
    flat = {**split.annotations[0], "id": 1000, "bbox": [1, 2, 7, 0]}
    rows = [*split.annotations, flat]
    split = checked_split("fit", "train", split.source, split.images, split.categories, rows)
    assert len(LetterboxedImages.build(split, (32, 32), 0, tmp_path / "cache").labels(0).boxes) == 1


def test_an_image_without_objects_has_empty_labels(tmp_path: Path) -> None:
    split = split_of(tmp_path, (40, 30), (40, 30))
    rest = [one for one in split.annotations if one["image_id"] == 10]
    split = checked_split("fit", "train", split.source, split.images, split.categories, rest)
    labels = LetterboxedImages.build(split, (32, 32), 0, tmp_path / "cache").labels(1)
    assert (tuple(labels.boxes.shape), tuple(labels.classes.shape)) == ((0, 4), (0,))


def test_the_cache_is_built_once_and_anew_when_something_changes(tmp_path: Path) -> None:
    split, cache = split_of(tmp_path, (40, 30)), tmp_path / "cache"

    def folders() -> int:
        return len([path for path in cache.iterdir() if path.is_dir()])

    LetterboxedImages.build(split, (32, 32), 0, cache)
    LetterboxedImages.build(split, (32, 32), 0, cache, lambda *_: pytest.fail("built again"))
    assert folders() == 1
    LetterboxedImages.build(split, (32, 64), 0, cache)
    LetterboxedImages.build(split, (32, 32), 1, cache)
    assert folders() == 3
    Image.new("RGB", (40, 30), (255, 0, 0)).save(split.images[0].path)
    changed = LetterboxedImages.build(split, (32, 32), 0, cache)
    assert folders() == 4
    assert changed.pixels[0, 0, 0].tolist() == [255, 0, 0]


def test_builders_that_ask_at_once_build_once(tmp_path: Path) -> None:
    split = split_of(tmp_path, *[(40, 30)] * 20)
    built: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        ready = list(
            pool.map(
                lambda _: LetterboxedImages.build(
                    split, (64, 64), 0, tmp_path / "cache", lambda done, _: built.append(done)
                ),
                range(4),
            )
        )
    assert built == list(range(1, 21))
    for images in ready[1:]:
        np.testing.assert_array_equal(images.pixels, ready[0].pixels)


def test_a_killed_builder_leaves_nothing_that_counts(tmp_path: Path) -> None:
    split, cache = split_of(tmp_path, (40, 30), (40, 30)), tmp_path / "cache"

    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LetterboxedImages.build(split, (32, 32), 0, cache, stop)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    assert len(LetterboxedImages.build(split, (32, 32), 0, cache)) == 2


def test_it_travels_to_workers_as_a_path(tmp_path: Path) -> None:
    images = LetterboxedImages.build(split_of(tmp_path, (40, 30)), (320, 320), 0, tmp_path / "cache")
    sent = pickle.dumps(images)
    assert len(sent) < 5_000
    received = pickle.loads(sent)
    np.testing.assert_array_equal(received.pixels, images.pixels)
    assert received.labels(0).classes.tolist() == [1]


def test_an_image_of_another_size_or_none_at_all_is_named(tmp_path: Path) -> None:
    split, cache = split_of(tmp_path, (40, 30)), tmp_path / "cache"
    path = split.images[0].path
    Image.new("RGB", (41, 30)).save(path)
    with pytest.raises(InputError, match=r"1.png': has 41 x 30 pixels, its annotations say 40 x 30; correct"):
        LetterboxedImages.build(split, (32, 32), 0, cache)
    Image.new("RGB", (30, 40)).save(path)
    with pytest.raises(InputError, match="EXIF"):
        LetterboxedImages.build(split, (32, 32), 0, cache)
    Image.fromarray(RANDOM.randint(0, 256, (30, 40, 3)).astype(np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=r"1.png': cannot be decoded"):
        LetterboxedImages.build(split, (32, 32), 0, cache)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_sixteen_bits_of_grey_become_eight(tmp_path: Path) -> None:
    path = tmp_path / "1.png"
    Image.fromarray(np.full((30, 40), 128 * 257, np.uint16)).save(path)
    assert Image.open(path).mode == "I;16"
    assert (decode(ImageRecord(10, path, 40, 30)) == 128).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_shades_without_a_fixed_range_are_refused(tmp_path: Path, dtype: type) -> None:
    path = tmp_path / "1.tif"
    Image.fromarray(np.ones((30, 40), dtype)).save(path)
    with pytest.raises(InputError, match=r"1.tif': cannot be decoded \(mode [IF] has no fixed range: save"):
        decode(ImageRecord(10, path, 40, 30))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_every_kind_of_picture_becomes_rgb(tmp_path: Path, mode: str) -> None:
    split = split_of(tmp_path, (40, 30))
    path = tmp_path / ("1.jpg" if mode == "CMYK" else "1.png")
    Image.new("RGB", (40, 30), (128, 128, 128)).convert(mode).save(path)
    images = [ImageRecord(10, path, 40, 30)]
    split = checked_split("fit", "train", split.source, images, split.categories, split.annotations)
    pixel = LetterboxedImages.build(split, (32, 32), 0, tmp_path / "cache").pixels[0, 5, 5]
    np.testing.assert_allclose(pixel.astype(int), [128, 128, 128], atol=2)


def test_an_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    pixels = np.zeros((30, 40, 3), dtype=np.uint8)
    pixels[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees for display
    split = split_of(tmp_path, (40, 30))
    Image.fromarray(pixels).save(split.images[0].path, exif=exif)
    images = LetterboxedImages.build(split, (30, 40), 0, tmp_path / "cache")
    np.testing.assert_array_equal(images.pixels[0], pixels)
