"""Ranges of activations, measured on real images, for post-training quantisation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

SAMPLES_PER_IMAGE = 4096
CLIPS = np.linspace(1.0, 0.4, 25)


@dataclass(frozen=True)
class Range:
    """Smallest and largest value that an 8-bit activation represents; 0 lies between."""

    low: float
    high: float


@dataclass(frozen=True)
class LayerRanges:
    """What a layer reads and what it produces (before any activation function)."""

    read: Range
    written: Range


def calibrate(
    network: nn.Module, layers: Sequence[str], images: Iterable[NDArray[np.float32]], seed: int = 0
) -> dict[str, LayerRanges]:
    """Ranges of each layer's input and output that quantise with the least squared error.

    Extremes and a random sample of values are collected per image; then the range is shrunk towards 0
    while the mean squared error of 8-bit rounding on the sample falls (MSE clipping; Banner et al. 2019,
    arXiv 1810.05723).

    Args:
        network: simplified, as it will be exported.
        layers: module names.
        images: `(1, 3, H, W)` float32, preprocessed, from the fit role.
    """
    generator = torch.Generator().manual_seed(seed)
    samples: dict[tuple[str, str], list[NDArray[np.float32]]] = defaultdict(list)

    def keep(name: str, side: str, tensor: Tensor) -> None:
        flat = tensor.detach().flatten()
        picked = torch.randint(flat.numel(), (SAMPLES_PER_IMAGE,), generator=generator)
        extremes = torch.stack((flat.min(), flat.max()))
        samples[name, side].append(torch.cat((extremes, flat[picked])).float().numpy())

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            keep(name, "read", inputs[0])
            keep(name, "written", output)

        return hook

    handles = [network.get_submodule(name).register_forward_hook(watch(name)) for name in layers]
    try:
        with torch.no_grad():
            for batch in images:
                network(torch.from_numpy(batch))
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: LayerRanges(
            best_range(np.concatenate(samples[name, "read"])),
            best_range(np.concatenate(samples[name, "written"])),
        )
        for name in layers
    }


def best_range(values: NDArray[np.float32], levels: int = 256) -> Range:
    """The range around 0 that rounds `values` to `levels` even steps with the least squared error."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    if high - low < 1e-12:
        return Range(0.0, 1e-6)
    # Only ends that are far out are worth clipping: what SiLU leaves below 0 is crowded at its very end.
    far = max(-low, high) / 2
    spans = [(low * (clip if -low > far else 1), high * (clip if high > far else 1)) for clip in CLIPS]
    errors = [_error(values, *span, levels) for span in spans]
    return Range(*spans[int(np.argmin(errors))])


def _error(values: NDArray[np.float32], low: float, high: float, levels: int) -> float:
    scale = (high - low) / (levels - 1)
    rounded = np.round(np.clip(values, low, high) / scale) * scale
    return float(np.mean((rounded - values) ** 2))
