"""The part of a network that a recipe leaves as it was, computed once an image instead of once an epoch.

What lies in front of every changed module is the base's own: frozen, its features depend on the image alone.
They are kept and put in the place of the calls that made them. The gradients of the rest are the same as
without.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evaluators.replay import (
    AllCapturedError,
    Capturing,
    NotReplayableError,
    Recording,
    Replaying,
    Script,
    tensors_in,
)
from spaces.detectors.base import Outputs

LIMIT_MB = 1024
"""Above this features are not kept."""
TOLERANCE = 0.02
"""Relative, of outputs on kept features: bfloat16 rounds to 0.004, a wrong feature is off by far more."""

Batch = Callable[[NDArray[np.int64], bool], Tensor]
"""Network input `(B, 3, H, W)` of images by index, mirrored or not."""


class FrozenPrefix:
    """The frozen part of one network, and its features on the images of a split.

    Features are computed when they are first asked for.

    Args:
        network: in the mode in which it is trained. Parameters in front of all changed modules are frozen.
        changed: names of the modules that differ from the base's.
        batch: makes network inputs.
        images: number of images.
        size: images of a batch.
        context: what forward passes run in, such as autocast.

    Raises:
        NotReplayableError: nothing is in front of the changed modules, its features are too large, or the
            network does what cannot be replayed; its parameters are then left as they were.
    """

    def __init__(
        self,
        network: nn.Module,
        changed: Collection[str],
        batch: Batch,
        images: int,
        size: int,
        views: int,
        context: Callable[[], Any],
    ) -> None:
        self._network, self._batch, self._context = network, batch, context
        names = {id(p): name for name, p in network.named_parameters()}
        first = batch(np.arange(size), False)
        outputs, self._script, behind = self._recorded(first, names, changed)
        self.parameters = frozenset(names.values()) - behind
        self._stored = np.zeros((views, images), dtype=bool)
        self._store: list[list[Tensor]] = []
        if not self.parameters or not self._script.kept:
            raise NotReplayableError("nothing is left as it was in front of what changed")
        self._check(outputs, size, images, views)
        for name, parameter in network.named_parameters():
            if name in self.parameters:
                parameter.requires_grad_(False)

    @property
    def norms(self) -> list[nn.Module]:
        """The frozen BatchNorms, whose statistics must stay the base's."""
        norms = [(n, m) for n, m in self._network.named_modules() if isinstance(m, nn.BatchNorm2d)]
        return [norm for name, norm in norms if f"{name}.weight" in self.parameters]

    def __call__(self, indices: NDArray[np.int64], mirrored: bool) -> Outputs:
        """What the network puts out on images; gradients reach the parameters that are not frozen."""
        self._complete(indices, mirrored)
        features = [_gathered(views[int(mirrored)], indices) for views in self._store]
        if self._script.reads_images:
            images = self._batch(indices, mirrored)
        else:
            images = torch.empty(self._shape, device="meta")
        with self._context(), Replaying(self._script, features):
            outputs: Outputs = self._network(images)
        return outputs

    def _recorded(
        self, images: Tensor, names: Mapping[int, str], changed: Collection[str]
    ) -> tuple[Outputs, Script, set[str]]:
        """Outputs, what the calls do, and the parameters that are not in front of the changed modules."""
        inside = tuple(f"{name}." for name in changed)
        own = {number: name for number, name in names.items() if name in changed or name.startswith(inside)}
        recording = Recording(images, names, own)

        def mark(_: nn.Module, __: Any, output: Any) -> None:
            recording.trained |= {id(tensor) for tensor in tensors_in(output)}

        modules = [module for name, module in self._network.named_modules() if name in changed]
        handles = [module.register_forward_hook(mark) for module in modules]
        try:
            with torch.no_grad(), self._context(), recording:
                outputs: Outputs = self._network(images)
        finally:
            for handle in handles:
                handle.remove()
        recording.read([tensor for tensor in outputs if id(tensor) not in recording.trained])
        self._shape = tuple(images.shape)
        return outputs, recording.script, recording.behind | set(own.values())

    def _check(self, wanted: Outputs, size: int, images: int, views: int) -> None:
        """Replay one batch, its features computed in two parts: what is not by image would show."""
        calls = self._script.calls
        kept = [call.made[k] for number, k in self._script.kept if (call := calls[number]) is not None]
        if any(not one.shape or one.shape[0] != size for one in kept):
            raise NotReplayableError("a feature is not of single images")
        row_bytes = sum(int(np.prod(one.shape[1:])) * one.dtype.itemsize for one in kept)
        if views * images * row_bytes > LIMIT_MB * 1e6:
            raise NotReplayableError("the features are too large to keep")
        indices = np.arange(size)
        for part in (indices[: size // 2], indices[size // 2 :]):
            if len(part):
                self._complete(part, False)
        try:
            with torch.no_grad():
                replayed = self(indices, False)
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:
            raise NotReplayableError(str(error).splitlines()[0]) from None
        for ours, plain in zip(replayed, wanted, strict=True):
            if float((ours.float() - plain.float()).norm()) > TOLERANCE * float(plain.float().norm()):
                raise NotReplayableError("kept features do not lead to the same outputs")

    def _complete(self, indices: NDArray[np.int64], mirrored: bool) -> None:
        """Compute the features of those of the images that have none yet."""
        view = int(mirrored)
        missing = np.unique(indices[~self._stored[view, indices]])
        if not len(missing):
            return
        images, capturing = self._batch(missing, mirrored), Capturing(self._script)
        try:
            with torch.no_grad(), self._context(), capturing:
                self._network(images)
        except AllCapturedError:
            pass
        rows = torch.from_numpy(missing)
        features = [capturing.features[slot] for slot in range(len(self._script.kept))]
        if not self._store:
            self._store = [[_room(f, self._stored.shape[1]) for _ in self._stored] for f in features]
        for slot, feature in enumerate(features):
            self._store[slot][view][rows] = _by_row(feature)
        self._stored[view, missing] = True


def _by_row(feature: Tensor) -> Tensor:
    """Channels last where there are channels: so the features are read again as they were made."""
    return feature.permute(0, 2, 3, 1) if feature.dim() == 4 else feature


def _room(feature: Tensor, images: int) -> Tensor:
    row = _by_row(feature)
    return torch.empty((images, *row.shape[1:]), dtype=row.dtype)


def _gathered(rows: Tensor, indices: NDArray[np.int64]) -> Tensor:
    found = rows[torch.from_numpy(indices)]
    return found.permute(0, 3, 1, 2) if found.dim() == 4 else found
