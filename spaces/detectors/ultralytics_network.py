"""Ultralytics' detection networks with raw outputs.

Their layers are built by their package, which is imported here and nowhere else, once a network is asked for.
How the layers are run is ours: a block splits its channels by what its layers read, so that pruned ones run.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from spaces.errors import InputError


@dataclass(frozen=True)
class Generation:
    """A generation of the family.

    Attributes:
        name: of their file of the architecture, without the scale.
        folder: where it lies among their models.
        neck: number of the first layer of the neck.
        head: number of the head, which is the last layer.
        bins: of a side's distance distribution; 1 where the head predicts the distance itself.
        end_to_end: whether its served head finds each object once, so that nothing has to be suppressed.
    """

    name: str
    folder: str
    neck: int
    head: int
    bins: int
    end_to_end: bool

    @property
    def prefix(self) -> str:
        """Of the head's members, `cv2` for boxes and `cv3` for classes with it in front."""
        return "one2one_" if self.end_to_end else ""


V8 = Generation("yolov8", "v8", neck=10, head=22, bins=16, end_to_end=False)
V11 = Generation("yolo11", "11", neck=11, head=23, bins=16, end_to_end=False)
V26 = Generation("yolo26", "26", neck=11, head=23, bins=1, end_to_end=True)


def library(module: str) -> Any:
    """A module of Ultralytics' package.

    While it is imported it neither looks for a network nor installs or prints anything, and what it writes
    into the environment of this process, such as OMP_NUM_THREADS, is taken back.

    Raises:
        InputError: the package is not installed, or lacks something itself.
    """
    try:
        with _quiet_environment():
            return importlib.import_module(module)
    except ImportError as error:
        remedy = (
            "Ultralytics' networks need their package, which is under AGPL-3.0: "
            "pip install -e '.[ultralytics]'"
        )
        if importlib.util.find_spec("ultralytics") is not None:
            remedy = f"Ultralytics' package cannot be imported ({error})"
        raise InputError("model", None, remedy) from None


@contextmanager
def _quiet_environment() -> Iterator[None]:
    before = dict(os.environ)
    for name, value in {"YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "0", "YOLO_VERBOSE": "0"}.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def build(generation: Generation, scale: str, num_classes: int) -> UltralyticsNetwork:
    """A network with fresh weights, in training mode, from the architecture that their package holds.

    Args:
        generation: of the family.
        scale: `n`, `s`, `m`, `l` or `x`.
        num_classes: number of categories.

    Raises:
        InputError: their package is not installed, or too old for this generation.
    """
    tasks = library("ultralytics.nn.tasks")
    file = Path(library("ultralytics").__file__).parent / "cfg" / "models" / generation.folder
    file = file / f"{generation.name}.yaml"
    if not file.is_file():
        remedy = "is not known to the installed Ultralytics; pip install --upgrade ultralytics"
        raise InputError("model", generation.name, remedy)
    plan = yaml.safe_load(file.read_text(encoding="utf-8")) | {"scale": scale}
    theirs = tasks.DetectionModel(plan, nc=num_classes, verbose=False)
    # A copy, for their layers share one activation module with all that are built in this process.
    layers: list[nn.Module] = list(copy.deepcopy(theirs.model))
    sources = [[layer.f] if isinstance(layer.f, int) else list(layer.f) for layer in theirs.model]
    return UltralyticsNetwork(layers, sources, generation)


class UltralyticsNetwork(nn.Module):
    """Images `(N, 3, H, W)` to raw outputs, with the names of Ultralytics' own state.

    Returns maps `(N, 4 * bins, h, w)` of the box sides' logits, left, top, right, bottom, finest level first,
    then maps `(N, C, h, w)` of the class logits. End-to-end generations have a second head that helps while
    they are trained from nothing and serves no prediction; it is left out.

    Args:
        layers: in order; the last one is the head.
        sources: numbers of the layers that each reads, -1 for the one before.
        generation: of the family.
    """

    def __init__(self, layers: list[nn.Module], sources: list[list[int]], generation: Generation) -> None:
        super().__init__()
        head = layers[-1]
        self.model = nn.Sequential(*layers[:-1], RawHead(head, generation.prefix))
        self.sources = sources
        for name, module in list(self.named_modules()):
            if hasattr(module, "inplace"):
                module.inplace = False  # what a hook has seen stays what it was
            if type(module).__name__ in SPLITTING:
                self.set_submodule(name, SplitBlock(module, every=type(module).__name__ != "C2PSA"))
        last = len(layers) - 1
        self.spare_weights = (f"model.{last}.cv2.", f"model.{last}.cv3.") if generation.end_to_end else ()
        self.class_branch = f"model.{last}.{generation.prefix}cv3."
        self.class_rows = f"{self.class_branch}0.2.bias"
        self.train()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found: list[Any] = []
        for layer, numbers in zip(self.model, self.sources, strict=True):
            read = [(found[number] if found else images) for number in numbers]
            found.append(layer(read if len(read) > 1 else read[0]))
        outputs: tuple[Tensor, ...] = found[-1]
        return outputs


class RawHead(nn.Module):
    """The predicting layers of a head, level by level, under the names that they have there."""

    def __init__(self, theirs: nn.Module, prefix: str) -> None:
        super().__init__()
        self._boxes, self._classes = f"{prefix}cv2", f"{prefix}cv3"
        for name in (self._boxes, self._classes):
            self.add_module(name, theirs.get_submodule(name))
        if any(True for _ in theirs.get_submodule("dfl").parameters()):
            self.add_module("dfl", theirs.get_submodule("dfl"))  # fixed numbers; their files have them

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, ...]:
        heads = [self.get_submodule(name) for name in (self._boxes, self._classes)]
        return tuple(level(x) for head in heads for level, x in zip(head, maps, strict=True))  # type: ignore[call-overload]


SPLITTING = ("C2f", "C3k2", "C2PSA")
"""Their blocks that hand one part of their channels on and send the other through inner blocks."""


class SplitBlock(nn.Module):
    """A cross-stage partial block (Wang et al. 2020, arXiv 1911.11929) with the layers of one of `SPLITTING`.

    Which of `cv1`'s channels go through the inner blocks `m` is told by what these read, so that either part
    can lose channels.

    Args:
        theirs: holds `cv1`, `m` and `cv2`.
        every: `cv2` reads what every inner block gives, not the last one alone.
    """

    def __init__(self, theirs: nn.Module, every: bool) -> None:
        super().__init__()
        self.cv1, self.m, self.cv2 = (theirs.get_submodule(name) for name in ("cv1", "m", "cv2"))
        self.every = every

    def forward(self, x: Tensor) -> Tensor:
        both = self.cv1(x)
        channels = int(both.shape[1])
        passed = channels - self._read(channels)
        # One operation behind each part, however many read it: that is what dependencies are traced by.
        parts = [torch.ops.aten.alias(part) for part in both.split((passed, channels - passed), dim=1)]
        for block in self.m.children():
            result = block(parts[-1])
            parts = [*parts, result] if self.every else [*parts[:-1], result]
        joined = torch.cat(parts, dim=1)
        merged: Tensor = self.cv2(joined)
        return merged

    def _read(self, channels: int) -> int:
        """Channels that the inner blocks read; where all of them were left out, from what is joined."""
        for module in self.m.modules():
            if isinstance(module, nn.Conv2d):
                return module.in_channels
        joined = next(m.in_channels for m in self.cv2.modules() if isinstance(m, nn.Conv2d))
        blocks = len(list(self.m.children()))
        return (joined - channels) // blocks if self.every else channels // 2
