"""Fine-tuning: its parts by hand, and that it brings a pruned network back towards its teacher."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evaluators.datasets.letterbox import LetterboxedImages
from evaluators.finetune import (
    DivergedError,
    FineTunePlan,
    fine_tune,
    mirrored_labels,
    schedule,
)
from evaluators.norms import norm_chunks, recalibrate_norms
from evaluators.quiet import QuietSlot
from evaluators.teacher import TeacherOutputs, batch_of
from spaces.apply import apply, same_state
from spaces.detectors.base import Detector, Labels, Outputs
from spaces.recipe import Prune, Recipe
from spaces.sites import find_sites

PLAN = FineTunePlan(epochs=2, batch_size=5, mirror=False)


@pytest.fixture(scope="module")
def teacher(
    digits_base: nn.Module,
    digits_detector: Detector,
    fit_images: LetterboxedImages,
    tmp_path_factory: pytest.TempPathFactory,
) -> TeacherOutputs:
    cache = tmp_path_factory.mktemp("teacher")
    return TeacherOutputs(digits_base, digits_detector, fit_images, cache, "base", mirrored=True)


@pytest.fixture(scope="module")
def halved(digits_base: nn.Module, digits_detector: Detector) -> nn.Module:
    """Half of the channels of the deepest stage and the neck gone; not to be changed."""
    sites = find_sites(digits_detector, digits_base)
    names = [name for name in sites.channel if name.startswith(("backbone.backbone.dark5", "backbone.C3"))]
    choices = tuple(Prune(site=name, sparsity=0.5) for name in names)
    recipe = Recipe(detector=digits_detector.name, choices=choices)
    return apply(digits_base, recipe, sites).network.requires_grad_(True)


def test_the_schedule_by_hand() -> None:
    assert [schedule(p) for p in (0.0, 0.05, 0.1, 0.55, 1.0)] == pytest.approx([0.1, 0.55, 1.0, 0.5, 0.0])


def test_mirrored_labels_by_hand() -> None:
    labels = Labels(torch.tensor([[10.0, 20.0, 30.0, 40.0], [0.0, 0.0, 96.0, 5.0]]), torch.tensor([4, 7]))
    mirrored = mirrored_labels(labels, 96)
    assert mirrored.boxes.tolist() == [[66.0, 20.0, 86.0, 40.0], [0.0, 0.0, 96.0, 5.0]]
    assert torch.equal(mirrored.classes, labels.classes)
    assert torch.equal(mirrored_labels(mirrored, 96).boxes, labels.boxes)
    nothing = Labels(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert mirrored_labels(nothing, 96).boxes.shape == (0, 4)


def test_recalibrated_norms_hold_the_average_over_batches(
    digits_base: nn.Module, digits_detector: Detector, fit_images: LetterboxedImages
) -> None:
    network = copy.deepcopy(digits_base)
    stem = network.get_submodule("backbone.backbone.stem")
    recalibrate_norms(network, digits_detector, fit_images, batch_size=5, limit=10)
    read: list[torch.Tensor] = []
    stem.conv.conv.register_forward_hook(lambda _, __, output: read.append(output))
    for first in (0, 5):
        network(batch_of(fit_images, digits_detector, np.arange(first, first + 5), False))
    mean = torch.stack([x.mean(dim=(0, 2, 3)) for x in read]).mean(dim=0)
    variance = torch.stack([x.var(dim=(0, 2, 3)) for x in read]).mean(dim=0)
    torch.testing.assert_close(stem.conv.bn.running_mean, mean, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(stem.conv.bn.running_var, variance, rtol=1e-4, atol=1e-3)
    assert not any(module.training for module in network.modules())
    momenta = [m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert momenta == [m.momentum for m in digits_base.modules() if isinstance(m, nn.BatchNorm2d)]
    weights = [(a, b) for a, b in zip(network.parameters(), digits_base.parameters(), strict=True)]
    assert all(torch.equal(a, b) for a, b in weights)


@pytest.mark.parametrize(("count", "batch_size"), [(2, 1), (5, 1), (5, 2), (9, 8), (20, 5)])
def test_norms_are_measured_on_two_images_or_more_at_once(count: int, batch_size: int) -> None:
    chunks = norm_chunks(count, batch_size)
    assert np.concatenate(chunks).tolist() == list(range(count))
    assert min(map(len, chunks)) >= 2


def distance(
    network: nn.Module, detector: Detector, images: LetterboxedImages, teacher: TeacherOutputs
) -> float:
    indices = np.arange(len(images))
    with torch.no_grad():
        outputs = network(batch_of(images, detector, indices, False))
    return float(detector.distillation(outputs, teacher(indices, False)))


def test_it_brings_a_pruned_network_closer_to_its_teacher(
    halved: nn.Module,
    digits_detector: Detector,
    fit_images: LetterboxedImages,
    teacher: TeacherOutputs,
    slot: QuietSlot,
) -> None:
    untrained, network, again = (copy.deepcopy(halved) for _ in range(3))
    none = list(fine_tune(untrained, digits_detector, fit_images, teacher, _plan(epochs=0), slot, 0))
    assert none == []
    epochs = list(fine_tune(network, digits_detector, fit_images, teacher, PLAN, slot, 0))
    assert [epoch.number for epoch in epochs] == [1, 2]
    assert epochs[1].loss < epochs[0].loss
    assert all(epoch.step_s > 0 for epoch in epochs)
    before, after = (distance(n, digits_detector, fit_images, teacher) for n in (untrained, network))
    assert after < 0.8 * before
    assert not any(module.training for module in network.modules())
    list(fine_tune(again, digits_detector, fit_images, teacher, PLAN, slot, 0))
    assert same_state(again.state_dict(), network.state_dict()), "the seed decides everything"


def test_no_epoch_measures_norms_and_changes_no_weight(
    halved: nn.Module,
    digits_detector: Detector,
    fit_images: LetterboxedImages,
    teacher: TeacherOutputs,
    slot: QuietSlot,
) -> None:
    network = copy.deepcopy(halved)
    list(fine_tune(network, digits_detector, fit_images, teacher, _plan(epochs=0), slot, 0))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), halved.parameters(), strict=True))
    assert not same_state(network.state_dict(), halved.state_dict())
    assert distance(network, digits_detector, fit_images, teacher) < distance(
        halved, digits_detector, fit_images, teacher
    )


def test_nan_is_an_error_that_says_where(
    halved: nn.Module,
    digits_detector: Detector,
    fit_images: LetterboxedImages,
    teacher: TeacherOutputs,
    slot: QuietSlot,
) -> None:
    network = copy.deepcopy(halved)
    with torch.no_grad():
        network.get_submodule("head.reg_preds.0").bias[0] = float("nan")
    with pytest.raises(DivergedError, match="loss is nan in epoch 1, step 1"):
        list(fine_tune(network, digits_detector, fit_images, teacher, PLAN, slot, 0))


class Asked:
    """A teacher that notes which views it was asked for."""

    def __init__(self, teacher: TeacherOutputs) -> None:
        self.teacher, self.views = teacher, list[bool]()

    def __call__(self, indices: "np.ndarray[tuple[int], np.dtype[np.int64]]", mirrored: bool) -> Outputs:
        self.views.append(mirrored)
        return self.teacher(indices, mirrored)


def test_shares_of_0_leave_a_loss_out_and_mirroring_can_be_turned_off(
    halved: nn.Module,
    digits_detector: Detector,
    fit_images: LetterboxedImages,
    teacher: TeacherOutputs,
    slot: QuietSlot,
    tmp_path: Path,
) -> None:
    def views(plan: FineTunePlan) -> list[bool]:
        asked = Asked(teacher)
        list(fine_tune(copy.deepcopy(halved), digits_detector, fit_images, asked, plan, slot, 3))  # type: ignore[arg-type]
        return asked.views

    assert views(_plan(epochs=1)) == [False] * 4  # 20 images in batches of 5
    assert set(views(_plan(epochs=2, mirror=True, task_weight=0.0))) == {False, True}
    assert views(_plan(epochs=1, distill_weight=0.0)) == []


def _plan(**changes: float) -> FineTunePlan:
    return FineTunePlan(**{**PLAN.model_dump(), **changes})


def test_bfloat16_trains_to_the_same_place(
    halved: nn.Module,
    digits_detector: Detector,
    fit_images: LetterboxedImages,
    teacher: TeacherOutputs,
    slot: QuietSlot,
) -> None:
    distances = []
    for precision in ("float32", "bfloat16"):
        network = copy.deepcopy(halved)
        plan = FineTunePlan(**{**PLAN.model_dump(), "precision": precision})
        list(fine_tune(network, digits_detector, fit_images, teacher, plan, slot, 0))
        assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
        distances.append(distance(network, digits_detector, fit_images, teacher))
    assert distances[1] == pytest.approx(distances[0], rel=0.05)


def test_the_precision_follows_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for isa, runs_in in (([], "float32"), (["avx2"], "float32"), (["avx2", "amx_bf16"], "bfloat16")):
        monkeypatch.setattr("evaluators.finetune.machine_signature", lambda isa=isa: {"isa": isa})
        assert FineTunePlan().runs_in == runs_in
        assert FineTunePlan(precision="bfloat16").runs_in == "bfloat16"
        assert FineTunePlan(precision="float32").runs_in == "float32"


def test_a_last_image_alone_joins_the_batch_before(
    digits_detector: Detector, fit_images: LetterboxedImages
) -> None:
    """A norm behind a global pool has one value a channel of it, and no variance."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))
    recalibrate_norms(network, digits_detector, fit_images, batch_size=4, limit=9)
    assert int(network[2].num_batches_tracked) == 2
    assert not network.training
