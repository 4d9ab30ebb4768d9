"""Ranges of activations, measured on real images, for post-training quantisation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from spaces.capabilities import Capabilities

SAMPLES_PER_IMAGE = 4096
SAMPLES_PER_CHANNEL = 512
CLIPS = np.linspace(1.0, 0.4, 25)
NEARLY_ALL = 0.9
FAR = 3.0
"""Times the extremes of nearly all images: beyond it, a range takes no heed of a value."""
INT8 = Capabilities()


class QuantizationPlan(BaseModel):
    """How ranges are found after training.

    Attributes:
        ranges: `mse` shrinks a range while the squared error of rounding falls, and takes no heed of values
            far beyond what nine images in ten reach; `percentile` cuts off what lies outside; `minmax`
            keeps everything.
        percentile: per cent of the values that a range of `percentile` holds on either side.
        bias_correction: move the mean of what layers of 8 bits put out back to where it was.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ranges: Literal["mse", "minmax", "percentile"] = "mse"
    percentile: float = Field(default=99.99, gt=50.0, le=100.0)
    bias_correction: bool = True


@dataclass(frozen=True)
class Range:
    """Smallest and largest value that an integer activation represents; 0 lies between."""

    low: float
    high: float

    def grid(self, levels: int = 256) -> tuple[float, int]:
        """Scale and zero point that spread the range over integers from 0 to `levels - 1`."""
        scale = (self.high - self.low) / (levels - 1)
        return scale, min(max(round(-self.low / scale), 0), levels - 1)


@dataclass(frozen=True)
class LayerRanges:
    """What a layer reads and what it produces (before any activation function), and in how many levels.

    Attributes:
        read, written: of the whole tensors.
        by_channel: of each channel that a depthwise convolution reads; empty elsewhere, and where the
            target takes one scale a tensor.
        written_by_channel: of each channel that is produced; empty where the target does not round those.
        largest: weights are integers from `-largest` to `largest`.
        levels: of what is read; what is written has 256.
        weight_scales: of each output channel, where training learned them.
    """

    read: Range
    written: Range
    by_channel: tuple[Range, ...] = ()
    written_by_channel: tuple[Range, ...] = ()
    largest: int = 127
    levels: int = 256
    weight_scales: tuple[float, ...] = ()

    @staticmethod
    def from_plain(fields: Mapping[str, Any]) -> LayerRanges:
        """What `dataclasses.asdict` made plain, also after a way through JSON."""

        def spans(side: str) -> tuple[Range, ...]:
            return tuple(Range(**span) for span in fields[side])

        return LayerRanges(
            Range(**fields["read"]),
            Range(**fields["written"]),
            spans("by_channel"),
            spans("written_by_channel"),
            fields["largest"],
            fields["levels"],
            tuple(fields["weight_scales"]),
        )


def calibrate(
    network: nn.Module,
    layers: Sequence[str] | Mapping[str, tuple[int, int]],
    images: Iterable[NDArray[np.float32]],
    seed: int = 0,
    plan: QuantizationPlan | None = None,
    capabilities: Capabilities = INT8,
) -> dict[str, LayerRanges]:
    """Ranges of each layer's input and output.

    Extremes and a random sample of values are collected per image; by default the range is then shrunk
    towards 0 while the mean squared error of rounding on the sample falls (MSE clipping; Banner et al.
    2019, arXiv 1810.05723). Channels that a depthwise convolution reads may differ by orders of magnitude
    and meet only in later layers, so each has a range of its own where the target can run that. Channels that
    are written keep their whole range: the activation function behind flattens one end of it, where rounding
    costs nothing, and clipping for the least squared error cuts the other (YOLOX-nano: 0.3 to 0.6 AP).

    Args:
        network: simplified, as it will be exported.
        layers: module names, with weight and activation bits where they are not 8.
        images: `(1, 3, H, W)` float32, preprocessed, from the fit role.
        seed: of the sample.
        plan: how ranges are chosen; MSE clipping without.
        capabilities: of the target.
    """
    bits = layers if isinstance(layers, Mapping) else dict.fromkeys(layers, (8, 8))
    plan = plan or QuantizationPlan()
    generator = torch.Generator().manual_seed(seed)
    samples: dict[tuple[str, str], list[NDArray[np.float32]]] = defaultdict(list)

    def keep(name: str, side: str, tensor: Tensor) -> None:
        flat = tensor.detach().flatten()
        picked = torch.randint(flat.numel(), (SAMPLES_PER_IMAGE,), generator=generator)
        extremes = torch.stack((flat.min(), flat.max()))
        samples[name, side].append(torch.cat((extremes, flat[picked])).float().numpy())

    def keep_channels(name: str, side: str, tensor: Tensor, count: int) -> None:
        rows = tensor.detach().transpose(0, 1).flatten(1)
        picked = torch.randint(rows.shape[1], (count,), generator=generator)
        extremes = (rows.amin(1, keepdim=True), rows.amax(1, keepdim=True))
        samples[name, side].append(torch.cat((*extremes, rows[:, picked]), dim=1).float().numpy())

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            keep(name, "read", inputs[0])
            keep(name, "written", output)
            whole_bytes = bits[name][1] >= 8  # fewer levels need a clip, which has no ends by channel
            if capabilities.depthwise_by_channel and whole_bytes and is_depthwise(module):
                keep_channels(name, "read channels", inputs[0], SAMPLES_PER_CHANNEL)
            if capabilities.written_by_channel and _channels_second(module, output):
                keep_channels(name, "written channels", output, 0)

        return hook

    handles = [network.get_submodule(name).register_forward_hook(watch(name)) for name in bits]
    try:
        with torch.no_grad():
            for batch in images:
                network(torch.from_numpy(batch))
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, (weight_bits, activation_bits) in bits.items():
        levels = 2 ** min(activation_bits, 8)
        read = tuple(chosen_range([row], levels, plan) for row in _rows(samples.get((name, "read channels"))))
        written = tuple(whole_range(row) for row in _rows(samples.get((name, "written channels"))))
        found[name] = LayerRanges(
            chosen_range(samples[name, "read"], levels, plan),
            chosen_range(samples[name, "written"], 256, plan),
            with_one_zero_point(read, levels) if read and capabilities.one_zero_point else read,
            written,
            largest=largest_weight(weight_bits),
            levels=levels,
        )
    return found


def with_one_zero_point(spans: Sequence[Range], levels: int = 256) -> tuple[Range, ...]:
    """Ranges widened until all of them have the same zero point, at the least cost.

    That is the zero point for which the squared steps, over those of the ranges themselves, have the smallest
    sum: channels count alike, for what they weigh later on is not known here.
    """
    low, high = (np.array([getattr(span, end) for span in spans]) for end in ("low", "high"))
    zeros = np.arange(levels)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        below = np.where(low < 0, -low / zeros, 0.0)
        above = np.where(high > 0, high / (levels - 1 - zeros), 0.0)
    steps = np.maximum(below, above)
    zero = int(((steps * (levels - 1) / (high - low)) ** 2).sum(axis=1).argmin())
    return tuple(Range(float(-zero * step), float((levels - 1 - zero) * step)) for step in steps[zero])


def _rows(parts: Sequence[NDArray[np.float32]] | None) -> NDArray[np.float32]:
    """Samples `(C, S)` of channels; none `(0, 0)` where there are no parts."""
    return np.concatenate(parts, axis=1) if parts else np.zeros((0, 0), np.float32)


def _channels_second(layer: nn.Module, output: Tensor) -> bool:
    """True where the second axis of what a layer produces holds its channels."""
    return isinstance(layer, nn.Conv2d) or output.dim() == 2


def is_depthwise(module: nn.Module) -> bool:
    """True for a convolution in which an output channel reads one input channel alone, its own."""
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels


def largest_weight(bits: int) -> int:
    """Largest integer of symmetric weights of a bit-width: 127 of 8 bits, 7 of 4, 1 of 2."""
    return int(2 ** (min(bits, 8) - 1) - 1)


def narrowed(ranges: LayerRanges, weight_bits: int, activation_bits: int) -> LayerRanges:
    """Ranges of 8 bits, taken for fewer: close to what calibration would find."""
    if activation_bits >= 8:
        return replace(ranges, largest=largest_weight(weight_bits))
    levels = 2**activation_bits
    return replace(ranges, largest=largest_weight(weight_bits), levels=levels, by_channel=())


def chosen_range(images: Sequence[NDArray[np.float32]], levels: int, plan: QuantizationPlan) -> Range:
    """The range of the values of some images, 0 included, as the plan says."""
    if plan.ranges == "mse":
        return best_range(within_usual(images), levels)
    values = np.concatenate(images)
    if plan.ranges == "minmax":
        return whole_range(values)
    return whole_range(np.percentile(values, (100.0 - plan.percentile, plan.percentile)))


def within_usual(images: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The values of some images without those that are far beyond what nearly all images have.

    Where a network leaves its usual path on one image (Faster R-CNN pooling from a corner of a level that
    nothing reads otherwise), values of twenty times the usual size would leave all others a dozen levels.
    """
    values = np.concatenate(images)
    low = FAR * min(float(np.quantile([one.min() for one in images], 1 - NEARLY_ALL)), 0.0)
    high = FAR * max(float(np.quantile([one.max() for one in images], NEARLY_ALL)), 0.0)
    return values[(low <= values) & (values <= high)]


def whole_range(values: NDArray[np.floating[Any]]) -> Range:
    """The range from the smallest to the largest value, 0 included."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    return Range(low, high) if high - low >= 1e-12 else Range(0.0, 1e-6)


def best_range(values: NDArray[np.float32], levels: int = 256) -> Range:
    """The range around 0 that rounds `values` to `levels` even steps with the least squared error."""
    whole = whole_range(values)
    low, high = whole.low, whole.high
    # Only ends that are far out are worth clipping: what SiLU leaves below 0 is crowded at its very end.
    far = max(-low, high) / 2
    spans = [(low * (clip if -low > far else 1), high * (clip if high > far else 1)) for clip in CLIPS]
    errors = [_error(values, *span, levels) for span in spans]
    low, high = spans[int(np.argmin(errors))]
    return Range(float(low), float(high))


def _error(values: NDArray[np.float32], low: float, high: float, levels: int) -> float:
    scale = (high - low) / (levels - 1)
    rounded = np.round(np.clip(values, low, high) / scale) * scale
    return float(np.mean((rounded - values) ** 2))
