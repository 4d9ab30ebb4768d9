"""Brief training of a candidate: the task loss and the distance to the base's outputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from evaluators.adafactor import StackedAdafactor
from evaluators.datasets.letterbox import LetterboxedImages
from evaluators.folded_norms import FoldedNorms
from evaluators.frozen_prefix import FrozenPrefix
from evaluators.norms import BEFORE_TRAINING, recalibrate_norms
from evaluators.quiet import QuietSlot
from evaluators.replay import NotReplayableError
from evaluators.signature import machine_signature
from evaluators.teacher import TeacherOutputs, batch_of
from evaluators.training_state import TrainingState
from spaces.detectors.base import Detector, Labels, Outputs

Precision = Literal["float32", "bfloat16"]
Forward = Callable[[np.ndarray[tuple[int], np.dtype[np.int64]], bool], Outputs]
"""Raw outputs of the network in training, float32, on images by index, mirrored or not."""


class FineTunePlan(BaseModel):
    """A candidate's training budget; the same for all candidates of a study.

    Attributes:
        epochs: passes over fit; 0 only measures the BatchNorm statistics of the pruned network anew.
        batch_size: images a step.
        learning_rate: step over the size of a tensor's weights, at its highest: a short rise, then half a
            cosine to 0. Twice the default brings more back of strong pruning, four times of it wrecks some
            detectors; see `paredown benchmark rates`.
        task_weight, distill_weight: shares of the two losses; 0 leaves one out.
        mirror: half of the batches are mirrored left to right. Turn it off where left and right carry a
            meaning, as in text.
        gradient_norm: longer gradients are shortened to it.
        precision: of convolutions and products in training (autocast); weights, losses and what is exported
            stay float32. `auto` is bfloat16 where the CPU multiplies it in hardware of its own (AMX).
        frozen_prefix: what lies in front of everything that a recipe changed keeps the base's weights; its
            features are computed once an image. It trains less and faster.
        quantization_aware: integer layers round while they are trained, and their scales are learned; see
            `evaluators.qat`. `auto`: where any has fewer than 8 bits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=3, ge=0)
    batch_size: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=4e-3, gt=0.0)
    task_weight: float = Field(default=0.5, ge=0.0)
    distill_weight: float = Field(default=1.0, ge=0.0)
    mirror: bool = True
    gradient_norm: float = Field(default=20.0, gt=0.0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    frozen_prefix: bool = False
    quantization_aware: bool | Literal["auto"] = "auto"

    def without_effect(self, widths: Sequence[int]) -> set[str]:
        """Fields that change nothing as they are, where a space has these bit-widths.

        A study of a version without them may go on.
        """
        unused = set() if self.frozen_prefix else {"frozen_prefix"}
        whole_bytes = self.quantization_aware == "auto" and min(widths) >= 8
        return unused | ({"quantization_aware"} if whole_bytes else set())

    @property
    def runs_in(self) -> Precision:
        """The precision on this machine."""
        if self.precision == "auto":
            return "bfloat16" if "amx_bf16" in machine_signature()["isa"] else "float32"
        return self.precision

    @property
    def dtype(self) -> torch.dtype:
        """Of `runs_in`."""
        return torch.bfloat16 if self.runs_in == "bfloat16" else torch.float32


@dataclass(frozen=True)
class Epoch:
    """After an epoch: its number from 1 on, mean loss, median seconds of a step, how to take the state."""

    number: int
    loss: float
    step_s: float
    state: Callable[[], TrainingState]


class DivergedError(RuntimeError):
    """The loss is no longer a finite number."""


def fine_tune(
    network: nn.Module,
    detector: Detector,
    images: LetterboxedImages,
    teacher: TeacherOutputs,
    plan: FineTunePlan,
    slot: QuietSlot,
    seed: int,
    start: TrainingState | None = None,
    changed: Collection[str] = (),
    norms_measured: bool = False,
) -> Iterator[Epoch]:
    """Train `network` in place, yielding after each epoch; from `start` on it ends bit for bit the same.

    With a frozen prefix it is the same up to rounding, for features are made in other batches then.

    Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) takes steps relative to the weights' own size:
    trained detectors differ by orders of magnitude there, and a rate that lets one recover wrecks
    another. BatchNorm statistics are measured anew first, unless `norms_measured` says that they are as they
    should be, and then kept, for batches are small; so the norms are folded into the convolutions.

    Every step is taken inside `slot.computing()`, so that measurements on this machine find it quiet.

    Raises:
        DivergedError: the loss is no longer finite.
    """
    with slot.computing():
        prefix = _prefix(network, detector, images, plan, changed)
        if start is None and not norms_measured:
            kept = prefix.norms if prefix is not None else []
            with autocast(plan):
                recalibrate_norms(network, detector, images, plan.batch_size, BEFORE_TRAINING, kept)
        _train_mode(network)
        folded = FoldedNorms(network, batch_of(images, detector, np.arange(1), False), plan.dtype)
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    forward: Forward = prefix or partial(_forward, folded, detector, images, plan)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = StackedAdafactor(trained, plan.learning_rate, plan.gradient_norm)
    labels = [images.labels(k) for k in range(len(images))]
    batch_size = min(plan.batch_size, len(images))
    steps = len(images) // batch_size
    first = 0 if start is None else start.restore(network, optimizer, random)
    for epoch in range(first, plan.epochs):
        order = random.permutation(len(images))
        losses, seconds = [], []
        for step in range(steps):
            indices = order[step * batch_size : (step + 1) * batch_size]
            mirrored = plan.mirror and bool(random.integers(2))
            rate = plan.learning_rate * schedule((epoch * steps + step) / (plan.epochs * steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            with slot.computing():
                started = time.perf_counter()
                losses.append(
                    _step(
                        forward, folded, detector, images, labels, teacher, plan, optimizer, indices, mirrored
                    )
                )
                seconds.append(time.perf_counter() - started)
            if not math.isfinite(losses[-1]):
                raise DivergedError(f"loss is {losses[-1]} in epoch {epoch + 1}, step {step + 1}")
        state = partial(TrainingState.of, epoch + 1, network, optimizer, random)
        yield Epoch(epoch + 1, float(np.mean(losses)), float(np.median(seconds)), state)
    network.eval()


def autocast(plan: FineTunePlan) -> AbstractContextManager[None]:
    """What forward passes of a training run in."""
    context: AbstractContextManager[None] = torch.autocast(
        "cpu", torch.bfloat16, enabled=plan.runs_in == "bfloat16"
    )
    return context


def _train_mode(network: nn.Module) -> None:
    """Training mode, but for BatchNorms, whose statistics stay."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def _prefix(
    network: nn.Module,
    detector: Detector,
    images: LetterboxedImages,
    plan: FineTunePlan,
    changed: Collection[str],
) -> FrozenPrefix | None:
    """The frozen prefix where the plan asks for one and the network has one; its parameters are frozen."""
    if not plan.frozen_prefix or not changed or not plan.epochs:
        return None
    _train_mode(network)
    size, views = min(plan.batch_size, len(images)), 2 if plan.mirror else 1
    batch = partial(batch_of, images, detector)
    try:
        return FrozenPrefix(network, changed, batch, len(images), size, views, partial(autocast, plan))
    except NotReplayableError:
        return None


def _forward(
    network: FoldedNorms,
    detector: Detector,
    images: LetterboxedImages,
    plan: FineTunePlan,
    indices: np.ndarray[tuple[int], np.dtype[np.int64]],
    mirrored: bool,
) -> Outputs:
    with autocast(plan):
        return network(batch_of(images, detector, indices, mirrored))


def schedule(progress: float, warmup: float = 0.1) -> float:
    """Learning rate over its highest at a progress in 0..1: a linear rise, then half a cosine to 0."""
    if progress < warmup:
        return 0.1 + 0.9 * progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def _step(
    forward: Forward,
    folded: FoldedNorms,
    detector: Detector,
    images: LetterboxedImages,
    labels: list[Labels],
    teacher: TeacherOutputs,
    plan: FineTunePlan,
    optimizer: torch.optim.Optimizer,
    indices: np.ndarray[tuple[int], np.dtype[np.int64]],
    mirrored: bool,
) -> float:
    outputs = tuple(output.float() for output in forward(indices, mirrored))
    loss = torch.zeros(())
    if plan.task_weight:
        width = images.pixels.shape[2]
        truth = [mirrored_labels(labels[k], width) if mirrored else labels[k] for k in indices]
        loss = loss + plan.task_weight * detector.loss(outputs, truth)
    if plan.distill_weight:
        loss = loss + plan.distill_weight * detector.distillation(outputs, teacher(indices, mirrored))
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    folded.hand_on()
    optimizer.step()
    return float(loss.detach())


def mirrored_labels(labels: Labels, width: int) -> Labels:
    """Labels of the image mirrored left to right; `width` in pixels."""
    x1, y1, x2, y2 = labels.boxes.unbind(dim=1)
    return Labels(torch.stack((width - x2, y1, width - x1, y2), dim=1), labels.classes)
