"""SimOTA, the task loss and the distillation loss of YOLOX."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from spaces.detectors.base import Labels, Outputs
from spaces.detectors.yolox import YoloX
from spaces.detectors.yolox_loss import Assignment, Predictions, assign, pair_iou

CLASSES = 4
DETECTOR = YoloX("tiny", CLASSES, (64, 64), depth=0.33, width=0.125)
BOXES = torch.tensor([[4.0, 6.0, 20.0, 30.0], [30.0, 10.0, 60.0, 50.0], [40.0, 50.0, 52.0, 62.0]])
LABELS = Labels(BOXES, torch.tensor([0, 3, 1]))
BLANK = Labels(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


def random_outputs(images: int = 1, seed: int = 0, spread: float = 0.5) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(images, 5 + CLASSES, 64 // s, 64 // s, generator=generator) * spread for s in (8, 16, 32)
    )


def centred(boxes: Tensor) -> Tensor:
    return torch.cat(((boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]), dim=1)


def assigned(outputs: Outputs, labels: Labels = LABELS) -> Assignment:
    boxes = centred(labels.boxes)[None]
    valid = torch.ones(1, len(labels.classes), dtype=torch.bool)
    return assign(Predictions.of(outputs), boxes, labels.classes[None], valid)


def slow_assignment(outputs: Outputs) -> set[tuple[int, int]]:
    """(cell, box) pairs by SimOTA as the paper tells it, one cell and one box at a time."""
    predictions = Predictions.of(outputs)
    truth = centred(BOXES)
    wanted: dict[int, list[tuple[float, int]]] = {}
    for g in range(3):
        x, y, w, h = truth[g].tolist()
        found = []
        for a in range(predictions.strides.numel()):
            stride = float(predictions.strides[a])
            cx, cy = (predictions.corners[:, a] + stride / 2).tolist()
            inside = abs(cx - x) < w / 2 and abs(cy - y) < h / 2
            near = abs(cx - x) < 2.5 * stride and abs(cy - y) < 2.5 * stride
            if not (inside or near):
                continue
            iou = float(pair_iou(predictions.boxes[0, :, a], truth[g]))
            cost = -3 * math.log(iou + 1e-8) + (0.0 if inside and near else 1e5)
            for c in range(CLASSES):
                logits = predictions.classes[0, c, a], predictions.objectness[0, a]
                p = math.sqrt(math.prod(1 / (1 + math.exp(-float(z))) for z in logits))
                cost -= math.log(p) if c == int(LABELS.classes[g]) else math.log(1 - p)
            found.append((cost, a, iou))
        count = max(1, int(sum(sorted((iou for _, _, iou in found), reverse=True)[:10])))
        for cost, a, _ in sorted(found)[:count]:
            wanted.setdefault(a, []).append((cost, g))
    return {(a, min(costs)[1]) for a, costs in wanted.items()}


@pytest.mark.parametrize("seed", range(8))
def test_assignment_agrees_with_the_slow_one(seed: int) -> None:
    outputs = random_outputs(seed=seed)
    found = assigned(outputs)
    assert set(zip(found.cell.tolist(), found.box.tolist(), strict=True)) == slow_assignment(outputs)


def test_each_box_has_a_cell_and_no_cell_two_boxes() -> None:
    for seed in range(20):
        found = assigned(random_outputs(seed=seed, spread=2.0))
        assert set(found.box.tolist()) == {0, 1, 2}
        assert len(set(found.cell.tolist())) == len(found.cell)


def test_a_box_out_of_the_network_s_reach_is_near_its_centre() -> None:
    found = assigned(random_outputs(), Labels(torch.tensor([[20.0, 20.0, 21.0, 21.0]]), torch.tensor([2])))
    predictions = Predictions.of(random_outputs())
    centres = predictions.corners[:, found.cell] + predictions.strides[found.cell] / 2
    assert ((centres - 20.5).abs() < 2.5 * predictions.strides[found.cell]).all()


def test_iou_by_hand() -> None:
    a = torch.tensor([2.0, 2.0, 4.0, 4.0])  # xyxy 0 0 4 4
    b = torch.tensor([4.0, 3.0, 4.0, 2.0])  # xyxy 2 2 6 4
    assert float(pair_iou(a, b)) == pytest.approx(4 / (16 + 8 - 4))
    assert float(pair_iou(a, torch.tensor([9.0, 9.0, 2.0, 2.0]))) == 0.0


def test_loss_of_blank_images_is_their_objectness() -> None:
    outputs = random_outputs(images=2)
    logits = torch.cat([level[:, 4].flatten(1) for level in outputs], dim=1)
    by_hand = torch.nn.functional.softplus(logits).sum() / 2
    torch.testing.assert_close(DETECTOR.loss(outputs, [BLANK, BLANK]), by_hand)


def test_a_perfect_cell_leaves_only_its_own_terms() -> None:
    """One box exactly predicted: IoU and L1 vanish; class targets are the IoU, 1."""
    label = Labels(torch.tensor([[8.0, 8.0, 24.0, 40.0]]), torch.tensor([1]))
    outputs = tuple(torch.full((1, 5 + CLASSES, 64 // s, 64 // s), -30.0) for s in (8, 16, 32))
    cell = outputs[0][0, :, 2, 1]  # corner (8, 16): centre (16, 24) is one cell right and down of it
    cell[:4] = torch.tensor([1.0, 1.0, math.log(2.0), math.log(4.0)])
    cell[4], cell[5:] = 0.0, torch.tensor([-2.0, 1.0, -30.0, -30.0])
    wanted = math.log(2) + math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))
    assert float(DETECTOR.loss(outputs, [label])) == pytest.approx(wanted, abs=1e-4)


def test_loss_does_not_depend_on_batch_size_or_order() -> None:
    outputs = random_outputs(images=3)
    labels = [LABELS, BLANK, Labels(BOXES[1:2], torch.tensor([2]))]
    once = DETECTOR.loss(outputs, labels)
    twice = DETECTOR.loss(tuple(torch.cat((level, level)) for level in outputs), labels * 2)
    torch.testing.assert_close(twice, once)
    for order in itertools.permutations(range(3)):
        shuffled = tuple(level[list(order)] for level in outputs)
        torch.testing.assert_close(DETECTOR.loss(shuffled, [labels[i] for i in order]), once)


def test_a_few_steps_learn_two_images() -> None:
    torch.manual_seed(0)
    network = DETECTOR.build()
    images = torch.rand(2, 3, 64, 64) * 255
    labels = [LABELS, BLANK]
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = DETECTOR.loss(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.25 * losses[0]


def test_distillation_vanishes_where_both_agree_and_only_there() -> None:
    teacher = random_outputs(images=2)
    assert float(DETECTOR.distillation(teacher, teacher)) == pytest.approx(0, abs=1e-4)
    for channel in (0, 2, 4, 5):
        student = tuple(level.clone() for level in teacher)
        student[0][:, channel] += 0.5
        assert float(DETECTOR.distillation(student, teacher)) > 1e-2


def test_distillation_is_finite_and_has_gradients_for_wild_outputs() -> None:
    student = tuple(level.requires_grad_() for level in random_outputs(spread=300.0, seed=1))
    loss = DETECTOR.distillation(student, random_outputs(spread=300.0, seed=2))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(level.grad).all() for level in student)


def test_distillation_brings_the_student_to_the_teacher() -> None:
    teacher = random_outputs(seed=1)
    student = tuple(level.requires_grad_() for level in random_outputs(seed=2))
    optimizer = torch.optim.Adam(student, lr=0.05)
    for _ in range(400):
        loss = DETECTOR.distillation(student, teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for ours, theirs in zip(student, teacher, strict=True):
        gap = ours.detach()[:, 4:].sigmoid() - theirs[:, 4:].sigmoid()
        assert float(gap.abs().max()) < 0.02
