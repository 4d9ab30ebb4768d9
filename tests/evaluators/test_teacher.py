"""Stored outputs of the teacher are those of the live one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evaluators import teacher as module
from evaluators.datasets.letterbox import LetterboxedImages
from evaluators.quiet import QuietSlot
from evaluators.teacher import TeacherOutputs, batch_of
from spaces.detectors.base import Detector, Outputs

SOME = np.array([3, 0, 19])


class Counted:
    """A network, and how many batches it was run on."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.calls = network, 0

    def __call__(self, images: torch.Tensor) -> Outputs:
        self.calls += 1
        outputs: Outputs = self.network(images)
        return outputs


@pytest.mark.parametrize("mirrored", [False, True])
def test_stored_outputs_equal_live_ones_in_float16(
    mirrored: bool,
    digits_base: nn.Module,
    digits_detector: Detector,
    fit_images: LetterboxedImages,
    tmp_path: Path,
    slot: QuietSlot,
) -> None:
    stored = TeacherOutputs(digits_base, digits_detector, fit_images, tmp_path, "key", True, slot)
    live = digits_base(batch_of(fit_images, digits_detector, SOME, mirrored))
    for ours, theirs in zip(stored(SOME, mirrored), live, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=2**-10, atol=2e-3)
    # Far closer than what the other view would give.
    assert float(digits_detector.distillation(stored(SOME, mirrored), live)) < 0.01
    assert float(digits_detector.distillation(stored(SOME, not mirrored), live)) > 0.5


def test_they_are_computed_once(
    digits_base: nn.Module, digits_detector: Detector, fit_images: LetterboxedImages, tmp_path: Path
) -> None:
    def made(key: str, mirrored: bool = False) -> int:
        counted = Counted(digits_base)
        TeacherOutputs(counted, digits_detector, fit_images, tmp_path, key, mirrored)  # type: ignore[arg-type]
        return counted.calls

    shapes_only, batches = 1, 3  # 20 images in batches of 8
    assert made("one") == shapes_only + batches
    assert made("one") == shapes_only
    assert made("other") == shapes_only + batches
    assert made("one", mirrored=True) == shapes_only + 2 * batches
    (stored,) = tmp_path.glob("teacher-one-*-1")
    (stored / "done.json").unlink()  # as after a kill while computing
    assert made("one") == shapes_only + batches


def test_outputs_of_other_code_are_not_taken_for_these(
    digits_base: nn.Module, digits_detector: Detector, fit_images: LetterboxedImages, tmp_path: Path
) -> None:
    """Same weights, data and key; what the network computes of them, or is fed, has changed."""

    def doubled(images: torch.Tensor) -> Outputs:
        return tuple(2 * output for output in digits_base(images))

    first = TeacherOutputs(digits_base, digits_detector, fit_images, tmp_path, "key", False)
    other = TeacherOutputs(doubled, digits_detector, fit_images, tmp_path, "key", False)  # type: ignore[arg-type]
    for one, two in zip(first(SOME, False), other(SOME, False), strict=True):
        torch.testing.assert_close(2 * one, two, rtol=2**-9, atol=1e-2)


def test_too_many_run_live(
    digits_base: nn.Module,
    digits_detector: Detector,
    fit_images: LetterboxedImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LIMIT_MB", 0.1)
    teacher = TeacherOutputs(digits_base, digits_detector, fit_images, tmp_path / "new", "key", True)
    live = digits_base(batch_of(fit_images, digits_detector, SOME, True))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(teacher(SOME, True), live, strict=True))
    assert not (tmp_path / "new").exists()


class Masked(nn.Module):
    """A network whose first output has logits that are masked, its second infinite ones."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> Outputs:
        first, second, *others = self.network(images)
        first[:, 5:8] = -1e9
        second[:, 5:8] = float("inf")
        return first, second, *others


def test_logits_that_half_precision_cannot_hold_stay_finite_stored_or_not(
    digits_base: nn.Module,
    digits_detector: Detector,
    fit_images: LetterboxedImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masked = Masked(digits_base)
    stored = TeacherOutputs(masked, digits_detector, fit_images, tmp_path, "key", False)
    monkeypatch.setattr(module, "LIMIT_MB", 0.0)
    live = TeacherOutputs(masked, digits_detector, fit_images, tmp_path, "key", False)
    student = digits_base(batch_of(fit_images, digits_detector, SOME, True))
    losses = [float(digits_detector.distillation(student, one(SOME, False))) for one in (stored, live)]
    assert np.isfinite(losses).all()
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert float(stored(SOME, False)[0][:, 5:8].max()) == -65504.0


def test_a_mirrored_batch_is_the_batch_from_right_to_left(
    digits_detector: Detector, fit_images: LetterboxedImages
) -> None:
    plain = batch_of(fit_images, digits_detector, SOME, False)
    assert torch.equal(batch_of(fit_images, digits_detector, SOME, True), plain.flip(3))
    assert plain.shape == (3, 3, 96, 96)
    blue_first = torch.from_numpy(fit_images.pixels[3, :, :, 2].astype(np.float32))
    assert torch.equal(plain[0, 0], blue_first)
