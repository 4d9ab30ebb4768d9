"""The base's raw outputs on the training images, computed once and memory-mapped for all workers."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evaluators.datasets.letterbox import LetterboxedImages, network_input
from evaluators.quiet import QuietSlot
from spaces.detectors.base import Detector, Outputs

BATCH = 8
LIMIT_MB = 4096
"""Above this the teacher runs beside the student instead: the outputs would not stay in memory."""
MOST = float(torch.finfo(torch.float16).max)


class TeacherOutputs:
    """Raw outputs of a frozen network on all images, plain and mirrored, stored as float16.

    What is beyond its range, such as logits masked with -1e9, becomes its largest number of that sign; so it
    does where nothing is stored, for the same loss.

    Args:
        network: the teacher, in evaluation mode.
        detector: its family.
        images: whose outputs are wanted; index i here is index i there.
        directory: where they are kept; workers of one machine share it.
        key: names teacher and data, so that outputs of others are never taken for these.
        mirrored: compute those of the mirrored images, too.
    """

    def __init__(
        self,
        network: nn.Module,
        detector: Detector,
        images: LetterboxedImages,
        directory: Path,
        key: str,
        mirrored: bool,
        slot: QuietSlot | None = None,
    ) -> None:
        self._network, self._detector, self._images = network, detector, images
        self._slot = slot
        first = self._forward(np.array([0]), False)
        shapes = [tuple(output.shape[1:]) for output in first]
        # Weights and data alone do not tell: the code of a user's detector may change, or its preprocessing.
        key += "-" + hashlib.sha256(b"".join(output.numpy().tobytes() for output in first)).hexdigest()[:8]
        views = 2 if mirrored else 1
        megabytes = views * len(images) * sum(int(np.prod(shape)) for shape in shapes) * 2 / 1e6
        self._maps: list[NDArray[np.float16]] | None = None
        if megabytes <= min(LIMIT_MB, shutil.disk_usage(_existing(directory)).free / 2e6):
            self._maps = self._stored(directory / f"teacher-{key}-{views}", shapes, views)

    def __call__(self, indices: NDArray[np.int64], mirrored: bool) -> Outputs:
        """Outputs of the images with these indices, float32, one batch."""
        if self._maps is None:
            return self._forward(indices, mirrored)
        view = int(mirrored)
        return tuple(torch.from_numpy(stored[view, indices].astype(np.float32)) for stored in self._maps)

    def _stored(self, folder: Path, shapes: list[tuple[int, ...]], views: int) -> list[NDArray[np.float16]]:
        files = [folder / f"output{k}.npy" for k in range(len(shapes))]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one worker computes, the others of this machine wait
            if not (folder / "done.json").exists():
                folder.mkdir(exist_ok=True)
                self._compute(files, shapes, views)
                (folder / "done.json").write_text(json.dumps({"images": len(self._images)}))
        return [np.load(file, mmap_mode="r") for file in files]

    def _compute(self, files: list[Path], shapes: list[tuple[int, ...]], views: int) -> None:
        count = len(self._images)
        maps = [
            np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=(views, count, *shape))
            for file, shape in zip(files, shapes, strict=True)
        ]
        for view in range(views):
            for indices in _chunks(count):
                with self._slot.computing() if self._slot else nullcontext():
                    outputs = self._forward(indices, bool(view))
                for stored, output in zip(maps, outputs, strict=True):
                    stored[view, indices] = output.numpy()
        for stored in maps:
            stored.flush()

    def _forward(self, indices: NDArray[np.int64], mirrored: bool) -> Outputs:
        with torch.no_grad():
            outputs: Outputs = self._network(batch_of(self._images, self._detector, indices, mirrored))
        return tuple(output.clamp(-MOST, MOST) for output in outputs)


def batch_of(images: LetterboxedImages, detector: Detector, indices: NDArray[Any], mirrored: bool) -> Tensor:
    """Network input `(B, 3, H, W)` float32 of some images, mirrored left to right if asked.

    In channels last, in which convolutions on CPUs run faster, whatever the layout of the weights.
    """
    pixels = images.pixels[indices]
    if mirrored:
        pixels = pixels[:, :, ::-1]
    batch = torch.from_numpy(network_input(np.ascontiguousarray(pixels), detector.preprocess))
    return batch.contiguous(memory_format=torch.channels_last)


def _chunks(count: int) -> Iterator[NDArray[np.int64]]:
    for first in range(0, count, BATCH):
        yield np.arange(first, min(first + BATCH, count))


def _existing(directory: Path) -> Path:
    while not directory.exists():
        directory = directory.parent
    return directory
