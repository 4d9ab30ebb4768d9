"""Quantised layers imitated in torch: close to what engines make of them, before there is a file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evaluators.calibration import LayerRanges
from evaluators.integers import weight_scales


def round_layer(layer: nn.Module, ranges: LayerRanges, weight_levels: int = 127) -> None:
    """Make a layer compute on rounded weights and inputs, for good.

    Args:
        layer: its weight is rounded in place, a hook rounds what it reads.
        ranges: calibrated.
        weight_levels: that the CPU bears, see `evaluators.signature.int8_weight_levels`.
    """
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    weight.data = rounded_weight(weight.data, min(ranges.largest, weight_levels), ranges.weight_scales)
    layer.register_forward_pre_hook(lambda _, inputs: (rounded_input(inputs[0], ranges),))


def rounded_weight(weight: Tensor, levels: int, learned: Sequence[float] = ()) -> Tensor:
    """A weight on the integers from `-levels` to `levels`, with a scale per output channel."""
    scales = torch.tensor(learned) if learned else torch.from_numpy(weight_scales(weight.numpy(), levels))
    scales = scales.view(-1, *(1,) * (weight.dim() - 1))
    return (weight / scales).round().clamp(-levels, levels) * scales


def rounded_input(tensor: Tensor, ranges: LayerRanges) -> Tensor:
    """What a layer reads of `(N, C, ...)`, on its levels."""
    grids = [span.grid(ranges.levels) for span in ranges.by_channel or (ranges.read,)]
    shape = (-1,) if len(grids) == 1 else (1, -1, *(1,) * (tensor.dim() - 2))
    scale = torch.tensor([scale for scale, _ in grids], dtype=tensor.dtype).view(shape)
    zero = torch.tensor([zero for _, zero in grids]).view(shape)
    integers = ((tensor / scale).round() + zero).clamp(0, ranges.levels - 1)
    return (integers - zero) * scale
