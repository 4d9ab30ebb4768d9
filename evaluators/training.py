"""Training of baselines: a resumable loop with a moving average of the weights.

Candidates of a search are fine-tuned elsewhere, with a teacher; this is how a base comes about.
"""

from __future__ import annotations

import math
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from evaluators.augment import Augment, augmented
from evaluators.blind_taps import BlindTaps
from evaluators.datasets.letterbox import LetterboxedImages, network_input
from spaces.detectors.base import Detector, Labels
from spaces.detectors.layout import takes_channels_last
from spaces.errors import InputError


class TrainingPlan(BaseModel):
    """How a baseline is trained; a checkpoint goes on only under the plan that it was made with.

    Attributes:
        epochs: passes over the images.
        batch_size: images a step.
        learning_rate: of AdamW, at its highest; from there it falls to 0 as a cosine.
        warmup_epochs: over which it rises from 0.
        weight_decay: of AdamW, on convolution weights only.
        average: decay of the moving average of the weights, which is what the baseline becomes.
        plain_epochs: at the end, without mosaic.
        gradient_norm: longer gradients are shortened to it.
        precision: of convolutions and products (autocast); weights and losses stay float32. bfloat16 pays on
            CPUs with AMX and on GPUs.
        augment: random changes to the images.
        seed: of all that is random.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(ge=1)
    batch_size: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0.0)
    warmup_epochs: float = Field(default=3.0, ge=0.0)
    weight_decay: float = Field(default=0.05, ge=0.0)
    average: float = Field(default=0.999, ge=0.0, lt=1.0)
    plain_epochs: int = Field(default=0, ge=0)
    gradient_norm: float = Field(default=20.0, gt=0.0)
    precision: Literal["float32", "bfloat16"] = "float32"
    augment: Augment = Augment()
    seed: int = 0


@dataclass(frozen=True)
class EpochReport:
    """What is known after an epoch: its number from 1 on, mean loss, learning rate and seconds."""

    epoch: int
    loss: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class Trained:
    """The moving average of the weights, in evaluation mode, and the seconds it took in all."""

    network: nn.Module
    seconds: float


Report = Callable[[EpochReport, nn.Module], None]
"""Called after each epoch, with the averaged network in evaluation mode."""


def train(
    detector: Detector,
    network: nn.Module,
    images: LetterboxedImages,
    plan: TrainingPlan,
    checkpoint: Path | None = None,
    report: Report | None = None,
    loaders: int = 0,
    start: str = "",
) -> Trained:
    """Train `network` in place, on the device that it is on, and return the moving average of its weights.

    Killed at any moment, it goes on from the last whole epoch when it is called again with the same
    checkpoint, and ends with the weights that it would have had.

    Args:
        detector: family of the network.
        network: with the weights to begin with.
        images: to train on.
        plan: how.
        checkpoint: written after every epoch.
        report: called after every epoch.
        loaders: processes that change images, whole epochs ahead; 0 does it between the steps. The batches
            are the same. A GPU would wait for a single process most of the time.
        start: what the network began with, in words.

    Raises:
        InputError: the checkpoint belongs to another plan, network, start or other images.
        FloatingPointError: the loss is no longer finite.
    """
    layout = torch.contiguous_format
    if takes_channels_last(network, detector.preprocess.size):
        layout = torch.channels_last  # a fifth less time a step on CPU
    network.to(memory_format=layout)
    steps = max(1, len(images) // plan.batch_size)
    average = deepcopy(network).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(_groups(network, plan.weight_decay), lr=plan.learning_rate)
    done, total = 0, 0.0
    origin = {"settings": plan.model_dump_json(), "images": images.split.fingerprint(), "start": start}
    if checkpoint is not None and checkpoint.exists():
        done, total = _restore(checkpoint, origin, network, average, optimizer)
    device = next(network.parameters()).device
    blind = BlindTaps(network, torch.zeros(1, 3, *detector.preprocess.size, device=device))
    started = time.perf_counter()
    for epoch, batches in zip(
        range(done, plan.epochs), _epochs(detector, images, plan, done, loaders), strict=True
    ):
        losses = []
        network.train()
        for step, (pixels, truth) in enumerate(batches):
            labels = [Labels(torch.from_numpy(boxes), torch.from_numpy(classes)) for boxes, classes in truth]
            batch = torch.from_numpy(network_input(pixels, detector.preprocess))
            at = epoch * steps + step
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(plan, at / steps)
            batch = batch.to(device, memory_format=layout)
            with torch.autocast(device.type, torch.bfloat16, enabled=plan.precision == "bfloat16"):
                outputs = network(batch)
            loss = detector.loss(tuple(output.float() for output in outputs), labels)
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(
                    f"loss is {float(loss.detach())} in epoch {epoch + 1}, step {step + 1}"
                )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            blind.clear()
            nn.utils.clip_grad_norm_(network.parameters(), plan.gradient_norm)
            optimizer.step()
            update_average(average, network, plan.average, at + 1)
            losses.append(float(loss.detach()))
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        total += seconds
        if checkpoint is not None:
            _save(checkpoint, origin, epoch + 1, total, network, average, optimizer)
        if report is not None:
            rate = optimizer.param_groups[0]["lr"]
            report(EpochReport(epoch + 1, float(np.mean(losses)), rate, seconds), average)
    return Trained(average, total)


def learning_rate(plan: TrainingPlan, epochs: float) -> float:
    """The rate after so many epochs: a linear rise, then half a cosine down to 0."""
    if epochs < plan.warmup_epochs:
        return plan.learning_rate * max(epochs, 1e-3) / plan.warmup_epochs
    span = max(plan.epochs - plan.warmup_epochs, 1e-9)
    return plan.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, (epochs - plan.warmup_epochs) / span)))


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float, updates: int) -> None:
    """Move `average` towards `network`; the first updates count for more, lest fresh weights linger."""
    decay = min(decay, (1 + updates) / (10 + updates))
    for mean, value in zip(_tensors(average), _tensors(network), strict=True):
        if not mean.is_floating_point():
            mean.copy_(value)
        elif isinstance(mean, nn.Parameter):
            mean.lerp_(value, 1 - decay)
        else:  # between -inf and itself, as masks have it, lies nothing but NaN
            mean.copy_(torch.where(mean == value, value, mean.lerp(value, 1 - decay)))


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def _groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay pulls weights of layers towards 0; on norms and biases it would only distort."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


Batch = tuple[NDArray[np.uint8], list[tuple[NDArray[np.float32], NDArray[np.int64]]]]
"""Pixels `(B, H, W, 3)`, and boxes and classes of each image. Arrays, for between processes each tensor
would take one of the files that a process may open."""


def _epochs(
    detector: Detector, images: LetterboxedImages, plan: TrainingPlan, done: int, loaders: int
) -> Iterable[Iterable[Batch]]:
    """Batches of every epoch that is left."""
    epochs = EpochBatches(detector, images, plan, listed=loaders > 0)
    if loaders == 0:
        return (epochs[epoch] for epoch in range(done, plan.epochs))
    return DataLoader(
        epochs,
        batch_size=None,
        sampler=range(done, plan.epochs),
        num_workers=loaders,
        multiprocessing_context="spawn",  # a fork of a process with engines' threads in it may crash
        prefetch_factor=1,
        collate_fn=_as_it_is,
    )


class EpochBatches(Dataset[Iterable[Batch]]):
    """Item k is epoch k: batches of changed images; what is left over for less than one waits.

    `listed` makes them all at once, as a loader process must.
    """

    def __init__(
        self, detector: Detector, images: LetterboxedImages, plan: TrainingPlan, listed: bool
    ) -> None:
        self._pad_value, self._images = detector.preprocess.pad_value, images
        self._plan, self._listed = plan, listed

    def __getitem__(self, epoch: int) -> Iterable[Batch]:
        return list(self._batches(epoch)) if self._listed else self._batches(epoch)

    def _batches(self, epoch: int) -> Iterator[Batch]:
        plan, images = self._plan, self._images
        random = np.random.default_rng((plan.seed, epoch))
        rules = plan.augment if epoch < plan.epochs - plan.plain_epochs else plan.augment.without_mosaic()
        order = random.permutation(len(images))
        size = min(plan.batch_size, len(order))
        for start in range(0, len(order) - size + 1, size):
            drawn = [
                augmented(images, int(index), rules, self._pad_value, random)
                for index in order[start : start + size]
            ]
            labels = [(label.boxes.numpy(), label.classes.numpy()) for _, label in drawn]
            yield np.stack([picture for picture, _ in drawn]), labels


def _as_it_is(batches: list[Batch]) -> list[Batch]:
    return batches


def _save(
    checkpoint: Path,
    origin: dict[str, str],
    epochs: int,
    seconds: float,
    network: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    draft = checkpoint.with_name(f".{checkpoint.name}.{os.getpid()}")
    state = {
        **origin,
        "epochs": epochs,
        "seconds": seconds,
        "network": network.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, draft)
    os.replace(draft, checkpoint)


def _restore(
    checkpoint: Path,
    origin: dict[str, str],
    network: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, float]:
    """Put everything back; returns the number of whole epochs and the seconds they took."""
    try:
        state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        raise InputError("checkpoint", str(checkpoint), "is damaged; remove it to start anew") from None
    for name, value in origin.items():
        if state.get(name) != value:
            remedy = f"is of a training with other {name}; remove it to start anew"
            raise InputError("checkpoint", str(checkpoint), remedy)
    try:
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
    except RuntimeError:
        raise InputError(
            "checkpoint", str(checkpoint), "is of another network; remove it to start anew"
        ) from None
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epochs"]), float(state["seconds"])
