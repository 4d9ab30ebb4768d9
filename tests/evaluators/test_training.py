"""Augmentation, the training loop and a whole small baseline."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evaluators.augment import Augment, augmented
from evaluators.baseline import BaselineConfig, train_baseline
from evaluators.datasets.base import DataConfig, load_splits
from evaluators.datasets.digits import write_digits
from evaluators.datasets.letterbox import LetterboxedImages
from evaluators.training import EpochReport, TrainingPlan, learning_rate, train, update_average
from spaces.detectors.yolox import YoloX
from spaces.errors import InputError

DETECTOR = YoloX("tiny", 10, (96, 96), depth=0.33, width=0.125)
EVERYTHING = Augment(
    flip=0.5, scale=(0.5, 2.0), translate=0.2, brightness=0.2, contrast=0.3, colour=0.2, mosaic=0.5
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(
        tmp_path_factory.mktemp("data") / "digits", images={"fit": 24, "select": 4, "report": 4}
    )


@pytest.fixture(scope="module")
def images(root: Path) -> LetterboxedImages:
    split = load_splits(DataConfig(root=root, format="coco"))["fit"]
    return LetterboxedImages.build(split, (96, 96), 114, root.parent / "cache")


def test_no_rules_change_nothing(images: LetterboxedImages) -> None:
    pixels, labels = augmented(images, 3, Augment(), 114, np.random.default_rng(0))
    np.testing.assert_array_equal(pixels, images.pixels[3])
    torch.testing.assert_close(labels.boxes, images.labels(3).boxes)
    torch.testing.assert_close(labels.classes, images.labels(3).classes)


def test_augmented_boxes_lie_in_the_picture(images: LetterboxedImages) -> None:
    random = np.random.default_rng(0)
    count = 0
    for turn in range(200):
        pixels, labels = augmented(images, turn % 24, EVERYTHING, 114, random)
        assert (pixels.shape, pixels.dtype) == ((96, 96, 3), np.uint8)
        assert labels.boxes.shape == (len(labels.classes), 4)
        assert labels.boxes.dtype == torch.float32
        assert labels.classes.dtype == torch.int64
        if len(labels.boxes):
            assert float(labels.boxes.min()) >= 0
            assert float(labels.boxes.max()) <= 96
            assert float((labels.boxes[:, 2:] - labels.boxes[:, :2]).min()) >= 2
        count += len(labels.boxes)
    assert count > 200


@pytest.mark.parametrize(
    "rules",
    [Augment(scale=(0.5, 1.6), translate=0.2), Augment(mosaic=1.0, scale=(0.5, 1.5)), Augment(flip=1.0)],
)
def test_boxes_move_with_their_pixels(rules: Augment) -> None:
    """Pictures of one white rectangle on black: the box is what is white, after as before."""

    class Rectangles:
        pixels = np.zeros((4, 96, 96, 3), dtype=np.uint8)

        def __len__(self) -> int:
            return 4

        def labels(self, index: int) -> object:
            box = torch.tensor([[10.0 + index, 30.0, 30.0 + index, 70.0]])
            return type("L", (), {"boxes": box, "classes": torch.tensor([index])})()

    pictures = Rectangles()
    for index in range(4):
        pictures.pixels[index, 30:70, 10 + index : 30 + index] = 255
    random = np.random.default_rng(1)
    seen = 0
    for turn in range(40):
        pixels, labels = augmented(pictures, turn % 4, rules, 0, random)  # type: ignore[arg-type]
        for x1, y1, x2, y2 in labels.boxes.tolist():
            inner = pixels[math.ceil(y1 + 1) : int(y2 - 1), math.ceil(x1 + 1) : int(x2 - 1)]
            assert inner.size == 0 or inner.min() > 200
            column = pixels[int((y1 + y2) / 2), :, 0]
            around = [int(x1) - 3, math.ceil(x2) + 2]
            for x in around:
                if 0 <= x < 96 and rules.mosaic == 0:
                    assert column[x] < 55
            seen += 1
    assert seen >= 20


def test_flip_mirrors_by_hand(images: LetterboxedImages) -> None:
    pixels, labels = augmented(images, 0, Augment(flip=1.0), 114, np.random.default_rng(0))
    np.testing.assert_array_equal(pixels, images.pixels[0][:, ::-1])
    before = images.labels(0).boxes
    torch.testing.assert_close(labels.boxes[:, 0], 96 - before[:, 2])
    torch.testing.assert_close(labels.boxes[:, 3], before[:, 3])


def test_learning_rate_by_hand() -> None:
    plan = TrainingPlan(epochs=12, warmup_epochs=2, learning_rate=1.0)
    assert learning_rate(plan, 1) == pytest.approx(0.5)
    assert learning_rate(plan, 2) == pytest.approx(1.0)
    assert learning_rate(plan, 7) == pytest.approx(0.5)
    assert learning_rate(plan, 12) == pytest.approx(0.0)


def test_average_by_hand() -> None:
    mean, value = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    nn.init.constant_(mean.weight, 1.0)
    nn.init.constant_(value.weight, 2.0)
    value.num_batches_tracked.fill_(7)
    update_average(mean, value, decay=0.9, updates=1)  # (1 + 1) / (10 + 1) = 0.18 is less than 0.9
    assert mean.weight.item() == pytest.approx(1 * 2 / 11 + 2 * 9 / 11)
    assert mean.num_batches_tracked.item() == 7
    nn.init.constant_(mean.weight, 1.0)
    update_average(mean, value, decay=0.9, updates=10_000)
    assert mean.weight.item() == pytest.approx(1.1)


def test_a_mask_stays_what_it_is_in_the_average() -> None:
    mean, value = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    for norm, other in ((mean, 1.0), (value, 2.0)):
        norm.running_mean = torch.tensor([float("-inf"), other])
    update_average(mean, value, decay=0.9, updates=10_000)
    assert mean.running_mean.tolist() == pytest.approx([float("-inf"), 1.1])


class _Killed(Exception):
    pass


def test_a_killed_training_ends_like_one_that_was_not(images: LetterboxedImages, tmp_path: Path) -> None:
    plan = TrainingPlan(epochs=3, batch_size=8, warmup_epochs=1, plain_epochs=1, augment=EVERYTHING)

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return DETECTOR.build()

    losses: list[float] = []
    straight = train(DETECTOR, fresh(), images, plan, None, lambda epoch, _: losses.append(epoch.loss))

    def die(epoch: EpochReport, _: nn.Module) -> None:
        if epoch.epoch == 1:
            raise _Killed

    with pytest.raises(_Killed):
        train(DETECTOR, fresh(), images, plan, tmp_path / "c.pt", die)
    resumed: list[EpochReport] = []
    network = DETECTOR.build()  # other weights: they must all come from the checkpoint
    after = train(DETECTOR, network, images, plan, tmp_path / "c.pt", lambda epoch, _: resumed.append(epoch))
    assert [epoch.epoch for epoch in resumed] == [2, 3]
    assert [epoch.loss for epoch in resumed] == losses[1:]
    assert losses[-1] < losses[0]
    for name, value in straight.network.state_dict().items():
        assert torch.equal(value, after.network.state_dict()[name]), name
    assert after.seconds > sum(epoch.seconds for epoch in resumed)

    with pytest.raises(InputError, match="other settings"):
        train(DETECTOR, fresh(), images, plan.model_copy(update={"seed": 1}), tmp_path / "c.pt")
    with pytest.raises(InputError, match="other start"):
        train(DETECTOR, fresh(), images, plan, tmp_path / "c.pt", start="COCO_V1")
    fewer = images.split.part("fit", "half", lambda image: image.id % 2 == 0)
    half = LetterboxedImages.build(fewer, (96, 96), 114, tmp_path / "cache")
    with pytest.raises(InputError, match="other images"):
        train(DETECTOR, fresh(), half, plan, tmp_path / "c.pt")
    other = YoloX("other", 10, (96, 96), depth=0.33, width=0.25)
    with pytest.raises(InputError, match="another network"):
        train(other, other.build(), images, plan, tmp_path / "c.pt")
    (tmp_path / "c.pt").write_bytes(b"cut")
    with pytest.raises(InputError, match="damaged"):
        train(DETECTOR, fresh(), images, plan, tmp_path / "c.pt")


def test_bfloat16_trains_alike_and_leaves_float32(images: LetterboxedImages) -> None:
    def losses(precision: str) -> list[float]:
        plan = TrainingPlan(epochs=2, batch_size=8, warmup_epochs=1, precision=precision)
        torch.manual_seed(0)
        found: list[float] = []
        trained = train(DETECTOR, DETECTOR.build(), images, plan, None, lambda e, _: found.append(e.loss))
        assert all(value.dtype != torch.bfloat16 for value in trained.network.state_dict().values())
        return found

    assert losses("bfloat16") == pytest.approx(losses("float32"), rel=0.03)
    assert losses("bfloat16") != losses("float32")


def test_a_small_baseline_from_configuration_to_figures(root: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        f"model: yolox_digits\nsize: [96, 96]\ndata: {{format: coco, root: {root}}}\n"
        "plan: {epochs: 2, batch_size: 8, augment: {mosaic: 0.5}}\n"
        "further: {epochs: 1, batch_size: 8}\n"
    )
    config = BaselineConfig.read(tmp_path / "c.yaml")
    lines: list[str] = []
    output = tmp_path / "base.safetensors"
    result = train_baseline(config, output, tmp_path / "runs", score_every=2, say=lines.append)
    assert output.stat().st_size < 3_000_000
    written = json.loads(output.with_suffix(".json").read_text())
    assert written == result
    assert set(written["figures"]) == {"select", "report"}
    assert 0 <= written["figures"]["report"]["map"] <= 100
    assert written["parameters"] == sum(
        p.numel() for p in YoloX("d", 10, (96, 96), 0.33, 0.1875).build().parameters()
    )
    assert lines[0].startswith("epoch 1/2")
    assert "select AP" in lines[1]
    assert lines[-1].startswith("report: AP")
    assert written["further"]["report"]["map_before"] == written["figures"]["report"]["map"]


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("model: yolox_digits\ndata: {}\nplan: {epochs: 0}\n", "plan.epochs"),
        ("model: yolox_digits\ndata: {}\nplan: {epochs: 1, lr: 3}\n", "plan.lr"),
        ("data: {}\nplan: {epochs: 1}\n", "model"),
        ("[1, 2", "no YAML"),
    ],
)
def test_bad_configurations_are_refused(tmp_path: Path, text: str, field: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=field):
        BaselineConfig.read(tmp_path / "c.yaml")


def test_loader_processes_change_nothing(images: LetterboxedImages) -> None:
    plan = TrainingPlan(epochs=3, batch_size=8, warmup_epochs=1, plain_epochs=1, augment=EVERYTHING)
    ended = []
    for loaders in (0, 2):
        torch.manual_seed(0)
        ended.append(train(DETECTOR, DETECTOR.build(), images, plan, loaders=loaders).network)
    for alone, together in zip(ended[0].parameters(), ended[1].parameters(), strict=True):
        assert torch.equal(alone, together)


def test_training_on_a_missing_gpu_is_refused(root: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    config = BaselineConfig(model="yolox_digits", data=DataConfig(root=root), plan=TrainingPlan(epochs=1))
    with pytest.raises(InputError, match="no CUDA device"):
        train_baseline(config, tmp_path / "weights.safetensors", tmp_path, device="cuda")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("epoch: 3", "plan.epoch: no such field"),
        ("epochs: 0", "plan.epochs: 0: must be greater than or equal to 1"),
        ("batch_size: 8", "plan.epochs: "),
    ],
)
def test_what_is_wrong_in_a_training_is_said_in_one_line(tmp_path: Path, plan: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"model: yolox_nano\ndata: {{format: digits}}\nplan: {{{plan}}}\n")
    with pytest.raises(InputError, match=message) as caught:
        BaselineConfig.read(file)
    assert "\n" not in str(caught.value)


def test_where_it_goes_is_looked_at_before_anything_is_trained(tmp_path: Path) -> None:
    config = BaselineConfig(model="yolox_nano", data=DataConfig(), plan=TrainingPlan(epochs=1))
    with pytest.raises(InputError, match=r"--output: '.*w.pth': must end in .safetensors"):
        train_baseline(config, tmp_path / "w.pth", tmp_path)
    with pytest.raises(InputError, match="--device: 'tpu': choose cpu"):
        train_baseline(config, tmp_path / "w.safetensors", tmp_path, device="tpu")
