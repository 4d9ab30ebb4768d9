"""COCO figures against values worked out by hand, and the bootstrap against pycocotools itself."""

import math
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torchvision.ops import batched_nms

from evaluators.accuracy import (
    FIGURES,
    category_matches,
    coco_figures,
    map_difference_interval,
    score_session,
    to_original,
)
from evaluators.bootstrap import mean_average_precision
from evaluators.datasets.base import DataConfig, load_split
from evaluators.datasets.letterbox import LetterboxedImages
from evaluators.datasets.split import DetectionSplit, ImageRecord, checked_split
from evaluators.targets.base import Detections
from spaces.detectors.base import Category, Preprocess
from spaces.errors import InputError

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


def split_of(boxes: dict[int, list[tuple[int, list[float], int]]]) -> DetectionSplit:
    """A split of 100x100 images from (category id, xywh, iscrowd) by image id."""
    annotations = [
        {"id": 0, "image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd}
        for image, rows in boxes.items()
        for category, box, crowd in rows
    ]
    for number, annotation in enumerate(annotations):
        annotation["id"] = number  # from 0: an id that pycocotools would take for "no match"
    images = [ImageRecord(image, Path(f"{image}.png"), 100, 100) for image in boxes]
    categories = [Category(3, "cup"), Category(7, "fork")]
    return checked_split("report", "val", Path("val.json"), images, categories, annotations)


def found(*rows: tuple[int, list[float], float]) -> Detections:
    """Detections from (category id, xyxy, score)."""
    return Detections(
        boxes=np.array([row[1] for row in rows], dtype=np.float32).reshape(-1, 4),
        scores=np.array([row[2] for row in rows], dtype=np.float32),
        labels=np.array([row[0] for row in rows], dtype=np.int64),
    )


def test_perfect_detections_score_100_and_absent_sizes_are_nan() -> None:
    split = split_of({1: [(3, [10, 10, 20, 20], 0)], 2: [(7, [0, 0, 10, 10], 0)]})
    figures = coco_figures(split, {1: found((3, [10, 10, 30, 30], 0.9)), 2: found((7, [0, 0, 10, 10], 0.4))})
    assert tuple(figures) == FIGURES
    assert figures["map"] == pytest.approx(100.0)
    assert figures["map_small"] == pytest.approx(100.0)
    assert math.isnan(figures["map_large"])
    assert math.isnan(figures["ar_medium"])


def test_a_box_of_iou_0_72_counts_at_five_of_ten_thresholds() -> None:
    # 100 wide, 72 of it covered: IoU 0.72 passes .50 .55 .60 .65 .70.
    split = split_of({1: [(3, [0, 0, 100, 10], 0)]})
    figures = coco_figures(split, {1: found((3, [0, 0, 72, 10], 0.9))})
    assert figures["map"] == pytest.approx(50.0)
    assert figures["map_50"] == pytest.approx(100.0)
    assert figures["map_75"] == pytest.approx(0.0)
    assert figures["ar_1"] == pytest.approx(50.0)


def test_a_confident_false_positive_halves_the_precision_and_a_missed_object_the_recall() -> None:
    split = split_of({1: [(3, [0, 0, 20, 20], 0), (3, [50, 50, 20, 20], 0)]})
    detections = {1: found((3, [80, 0, 95, 15], 0.9), (3, [0, 0, 20, 20], 0.8))}
    # Precision 1/2 up to recall 1/2: 51 of the 101 sampled recalls (0.00 to 0.50).
    assert coco_figures(split, detections)["map"] == pytest.approx(100 * 0.5 * 51 / 101)


def test_detections_on_a_crowd_region_are_ignored() -> None:
    split = split_of({1: [(3, [0, 0, 20, 20], 0), (3, [50, 50, 50, 50], 1)]})
    detections = {1: found((3, [55, 55, 65, 65], 0.9), (3, [0, 0, 20, 20], 0.8))}
    assert coco_figures(split, detections)["map"] == pytest.approx(100.0)


def test_no_detections_score_0(capsys: pytest.CaptureFixture[str]) -> None:
    split = split_of({1: [(3, [0, 0, 20, 20], 0)], 2: []})
    assert coco_figures(split, {})["map"] == 0.0
    assert coco_figures(split, {1: found(), 2: found()})["ar_100"] == 0.0
    assert capsys.readouterr().out == ""


def test_detections_that_do_not_belong_are_refused() -> None:
    split = split_of({1: [(3, [0, 0, 20, 20], 0)]})
    with pytest.raises(InputError, match=r"category id: 0: unknown in val.json"):
        coco_figures(split, {1: found((0, [0, 0, 20, 20], 0.9))})
    with pytest.raises(InputError, match=r"image id: 5: no such image"):
        coco_figures(split, {5: found((3, [0, 0, 20, 20], 0.9))})
    with pytest.raises(ValueError, match="image 1 hold NaN"):
        coco_figures(split, {1: found((3, [0, 0, float("nan"), 20], 0.9))})


def test_boxes_go_back_to_the_original() -> None:
    back = to_original(found((3, [-1, 10, 20, 40], 0.5)), np.array([0.5, 0.25]))
    np.testing.assert_allclose(back.boxes, [[-2, 40, 40, 160]])
    assert back.boxes.dtype == np.float32


def random_case(
    seed: int, decimals: int = 1
) -> tuple[DetectionSplit, dict[int, Detections], dict[int, Detections]]:
    """12 images with objects, crowds, near and false detections; scores of one decimal make many ties."""
    random = np.random.RandomState(seed)
    truth: dict[int, list[tuple[int, list[float], int]]] = {}
    sides: tuple[dict[int, Detections], dict[int, Detections]] = ({}, {})
    for image in range(1, 13):
        truth[image] = []
        rows: tuple[list, list] = ([], [])
        for number in range(random.randint(1, 6)):
            x, y, w, h = (*random.uniform(0, 60, 2).tolist(), *random.uniform(8, 39, 2).tolist())
            category = int(random.choice([3, 7]))
            truth[image].append((category, [x, y, w, h], int(number > 0 and random.rand() < 0.2)))
            for side, blur in zip(rows, (1.5, 4.0), strict=True):
                corners = np.array([x, y, x + w, y + h]) + random.randn(4) * blur
                side.append((category, corners.tolist(), round(float(random.rand()), decimals)))
                if random.rand() < 0.5:
                    side.append((category, (corners + 30).tolist(), round(float(random.rand()), decimals)))
        for side, rows_of_side in zip(sides, rows, strict=True):
            side[image] = found(*rows_of_side)
    return split_of(truth), *sides


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_fast_map_is_that_of_pycocotools(seed: int) -> None:
    split, a, b = random_case(seed)
    ones = np.ones((1, len(split.images)), dtype=np.int64)
    for detections in (a, b):
        expected = coco_figures(split, detections)["map"]
        assert 5 < expected < 95
        assert mean_average_precision(category_matches(split, detections), ones)[0] == pytest.approx(
            expected, abs=1e-6
        )


def test_a_resample_scores_as_a_data_set_in_which_images_are_really_repeated() -> None:
    split, detections, _ = random_case(3, decimals=6)
    counts = np.random.RandomState(0).multinomial(12, np.full(12, 1 / 12), size=5).astype(np.int64)
    fast = mean_average_precision(category_matches(split, detections), counts)
    for weights, value in zip(counts, fast, strict=True):
        copies = [image for image, count in zip(split.images, weights, strict=True) for _ in range(count)]
        boxes = split.by_image()
        repeated = split_of(
            {
                new: [(one["category_id"], one["bbox"], one["iscrowd"]) for one in boxes[image.id]]
                for new, image in enumerate(copies, start=1)
            }
        )
        slow = coco_figures(
            repeated, {new: detections[image.id] for new, image in enumerate(copies, start=1)}
        )
        assert value == pytest.approx(slow["map"], abs=1e-6)


def test_the_interval_holds_the_difference_and_vanishes_against_oneself() -> None:
    split, sharp, blurred = random_case(4)
    difference, low, high = map_difference_interval(split, sharp, blurred, resamples=200)
    expected = coco_figures(split, sharp)["map"] - coco_figures(split, blurred)["map"]
    assert difference == pytest.approx(expected, abs=1e-6)
    assert low < difference < high
    assert low > 0  # a blur of 4 pixels against 1.5 is no tie
    assert map_difference_interval(split, sharp, sharp, resamples=50) == (0.0, 0.0, 0.0)
    reverse = map_difference_interval(split, blurred, sharp, resamples=200)
    assert reverse == pytest.approx((-difference, -high, -low))


class PublishedYolox:
    """The published ONNX file behind the Session protocol, decoded as its authors say."""

    def __init__(self, model: Path, category_ids: list[int]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.engine = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.ids = np.array(category_ids)
        grids = [np.stack(np.meshgrid(np.arange(416 // s), np.arange(416 // s)), -1) for s in (8, 16, 32)]
        self.grid = np.concatenate([grid.reshape(-1, 2) for grid in grids])
        self.stride = np.concatenate([np.full((len(g.reshape(-1, 2)), 1), 416 // len(g)) for g in grids])

    def run(self, images: np.ndarray) -> Detections:
        raw = self.engine.run(None, {self.engine.get_inputs()[0].name: images})[0][0]
        centre, size = (raw[:, :2] + self.grid) * self.stride, np.exp(raw[:, 2:4]) * self.stride
        scores = raw[:, 4:5] * raw[:, 5:]
        classes = scores.argmax(axis=1)  # one class an anchor, as the authors' own post-processing
        anchors = np.flatnonzero(scores.max(axis=1) > 0.01)
        classes = classes[anchors]
        boxes = torch.from_numpy(np.concatenate([centre - size / 2, centre + size / 2], 1)[anchors])
        kept = batched_nms(
            boxes.float(), torch.from_numpy(scores[anchors, classes]), torch.from_numpy(classes), 0.65
        )[:100].numpy()
        return Detections(
            boxes.float().numpy()[kept], scores[anchors, classes][kept], self.ids[classes[kept]]
        )

    def kernels(self) -> dict[str, str]:
        return {}


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data beside the repository")
def test_the_published_yolox_nano_scores_what_was_measured_independently(tmp_path: Path) -> None:
    split = load_split(DataConfig(root=SHARED / "cocomini416"), "val")
    preprocess = Preprocess(size=(416, 416), channel_order="BGR")
    images = LetterboxedImages.build(split, preprocess.size, preprocess.pad_value, tmp_path)
    session = PublishedYolox(SHARED / "weights" / "yolox_nano.onnx", [one.id for one in split.categories])
    figures, detections = score_session(session, split, images, preprocess)
    assert set(detections) == {image.id for image in split.images}
    assert figures["map"] == pytest.approx(31.64, abs=0.1)
    assert figures["map_50"] == pytest.approx(47.76, abs=0.2)
