"""Mean gates of squeeze-and-excitation blocks, handed to `spaces` as plain numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evaluators.datasets.letterbox import LetterboxedImages, spread
from evaluators.quiet import QuietSlot
from evaluators.teacher import batch_of
from spaces.detectors.base import Detector
from spaces.gates import gates_of

IMAGES = 64
"""Gates of a block differ little from image to image: their means settle soon."""


def mean_gates(
    network: nn.Module,
    detector: Detector,
    images: LetterboxedImages,
    slot: QuietSlot,
    blocks: Collection[str],
) -> dict[str, Tensor]:
    """Means over images `(channels,)` of the gates of blocks, by name; blocks that show none are left out.

    An image counts by the energy of the channel in it: so the mean is the constant that changes the least of
    what the block returns (least squares). A channel that is always silent has the gate 1.

    Args:
        network: the base, in evaluation mode.
        images: of the fit role.
        blocks: names of modules, as `spaces.gates.gate_sites` finds them.
    """
    weighed: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def note(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            gates = gates_of(inputs[0], output)
            if gates is not None:
                weighed[name].append((gates[0], inputs[0][0].square().mean(dim=(1, 2))))

        return hook

    handles = [network.get_submodule(name).register_forward_hook(note(name)) for name in blocks]
    try:
        with torch.no_grad():
            for k in spread(len(images), IMAGES):
                with slot.computing():
                    network(batch_of(images, detector, np.array([k]), mirrored=False))
    finally:
        for handle in handles:
            handle.remove()
    means = {}
    for name, pairs in weighed.items():
        gates, energies = (torch.stack(part) for part in zip(*pairs, strict=True))
        total = energies.sum(dim=0)
        silent = total == 0
        means[name] = torch.where(
            silent, 1.0, (gates * energies).sum(dim=0) / torch.where(silent, 1.0, total)
        )
    return means
