"""Memory layouts: convolutions on CPUs run faster in channels last, which not every network takes."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


def takes_channels_last(network: nn.Module, size: tuple[int, int]) -> bool:
    """Whether a network runs with input and weights in channels last.

    `x.view(x.shape[0], -1)` of a feature map does not: it needs channels first.

    Args:
        network: left untouched.
        size: height and width of the input in pixels.
    """
    draft = deepcopy(network).eval().to(memory_format=torch.channels_last)
    device = next((p.device for p in draft.parameters()), torch.device("cpu"))
    images = torch.zeros(1, 3, *size, device=device).contiguous(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            draft(images)
    except RuntimeError:
        return False
    return True


def keep_channels_first(network: nn.Module) -> None:
    """Have a network read every input in channels first, whatever it is given."""
    network.register_forward_pre_hook(_in_channels_first)


def _in_channels_first(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one.contiguous() if isinstance(one, Tensor) else one for one in inputs)
