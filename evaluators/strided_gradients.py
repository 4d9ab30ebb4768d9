"""Gradients of strided convolutions in bfloat16, which oneDNN may leave NaN where they are 0.

Where such a convolution reads maps that are one pixel wide, as the last levels of an SSD are, some taps see
padding alone. The kernel (oneDNN 3.12, torch 2.14) multiplies what it finds in memory by 0 there; that is NaN
now and then, and the next step spreads it over the whole network.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def is_strided(layer: nn.Module) -> bool:
    """True for a convolution whose gradient may be so."""
    return isinstance(layer, nn.Conv2d) and max(layer.stride) > 1 and max(layer.kernel_size) > 1


def strided_weights(network: nn.Module) -> list[Tensor]:
    """The weights of all of them, or what parametrizations make these of."""
    layers = [layer for layer in network.modules() if is_strided(layer)]
    return [parameter for layer in layers for parameter in layer.parameters() if parameter.dim() > 1]


@torch.no_grad()
def zero_garbage(weights: Iterable[Tensor]) -> None:
    """Set what is not finite in the gradients of these weights to 0.

    A training that diverges is told by its loss all the same.
    """
    for weight in weights:
        if weight.grad is not None:
            weight.grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
