"""The training loop that one writes with torchvision, on the same recipe: what ours is compared with.

Its form is that of torchvision's detection reference (`train_one_epoch`): a DataLoader that reads image
files, the teacher in evaluation mode beside the student, float32, torch's optimiser, no cache of any kind.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from evaluators.bench import Bench
from evaluators.datasets.letterbox import decode, letterbox, network_input
from evaluators.finetune import (
    DivergedError,
    Epoch,
    FineTunePlan,
    mirrored_labels,
    schedule,
)
from evaluators.norms import BEFORE_TRAINING, measure_norms, norm_chunks
from evaluators.training_state import TrainingState
from spaces.detectors.base import Labels


class ImageFiles(Dataset[tuple[Tensor, Labels]]):
    """The images of fit, read from their files each time, with what a network should find."""

    def __init__(self, bench: Bench) -> None:
        self._split, self._look = bench.splits["fit"], bench.detector.preprocess
        self._labels = [bench.fit.labels(k) for k in range(len(bench.fit))]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Labels]:
        look = self._look
        pixels, _ = letterbox(decode(self._split.images[index]), look.size, look.pad_value, look.fit)
        return torch.from_numpy(network_input(pixels[None], look)[0]), self._labels[index]


def batches_of(
    files: ImageFiles, batches: Sequence[NDArray[np.int64]]
) -> Iterator[tuple[Tensor, list[Labels]]]:
    """Batches `(B, 3, H, W)` and their labels, in the given order, read in this process."""
    chosen = [batch.tolist() for batch in batches]
    yield from DataLoader(files, batch_sampler=chosen, collate_fn=_collated)


def plain_fine_tune(network: nn.Module, bench: Bench, plan: FineTunePlan, seed: int) -> Iterator[Epoch]:
    """Train `network` in place as `evaluators.finetune.fine_tune` does, with nothing done for speed.

    The same seed draws the same batches, mirrors the same ones and takes the same learning rates.

    Raises:
        DivergedError: the loss is no longer finite.
    """
    files = ImageFiles(bench)
    batch_size = min(plan.batch_size, len(files))
    chunks = norm_chunks(min(BEFORE_TRAINING, len(files)), batch_size)
    measure_norms(network, (images for images, _ in batches_of(files, chunks)))
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    optimizer = torch.optim.Adafactor(network.parameters(), lr=plan.learning_rate, weight_decay=0.0)
    steps = len(files) // batch_size
    for epoch in range(plan.epochs):
        order = random.permutation(len(files))
        batches = [order[step * batch_size : (step + 1) * batch_size] for step in range(steps)]
        losses, seconds, started = [], [], time.perf_counter()
        for step, (images, labels) in enumerate(batches_of(files, batches)):
            if plan.mirror and bool(random.integers(2)):
                images = images.flip(3)
                labels = [mirrored_labels(one, images.shape[3]) for one in labels]
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate * schedule((epoch * steps + step) / (plan.epochs * steps))
            with bench.slot.computing():
                losses.append(_step(network, bench, plan, optimizer, images, labels))
            if not math.isfinite(losses[-1]):
                raise DivergedError(f"loss is {losses[-1]} in epoch {epoch + 1}, step {step + 1}")
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
        state = partial(TrainingState.of, epoch + 1, network, optimizer, random)
        yield Epoch(epoch + 1, float(np.mean(losses)), float(np.median(seconds)), state)
    network.eval()


def _step(
    network: nn.Module,
    bench: Bench,
    plan: FineTunePlan,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: list[Labels],
) -> float:
    outputs = network(images)
    loss = torch.zeros(())
    if plan.task_weight:
        loss = loss + plan.task_weight * bench.detector.loss(outputs, labels)
    if plan.distill_weight:
        with torch.no_grad():
            wanted = bench.base(images)
        loss = loss + plan.distill_weight * bench.detector.distillation(outputs, wanted)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(network.parameters(), plan.gradient_norm)
    optimizer.step()
    return float(loss.detach())


def _collated(pairs: list[tuple[Tensor, Labels]]) -> tuple[Tensor, list[Labels]]:
    return torch.stack([image for image, _ in pairs]), [labels for _, labels in pairs]
