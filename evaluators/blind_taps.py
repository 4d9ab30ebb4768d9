"""Taps of strided convolutions that see padding alone, whose gradients oneDNN leaves undefined in bfloat16.

Such taps are where maps are one pixel wide, as the last levels of an SSD are. Their gradient is 0. What the
kernel (oneDNN 3.12, torch 2.14) leaves there depends on what was in memory, mostly 0, but now and then NaN or
1e29, with which one step ruins the network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BlindTaps:
    """The blind taps of a network, and the weights that they are of.

    Args:
        network: whose module names and weights stay what they are.
        image: `(1, 3, H, W)`: run once, in evaluation mode and without gradients, to see what reads what.
    """

    def __init__(self, network: nn.Module, image: Tensor) -> None:
        self.of: dict[nn.Conv2d, Tensor] = {}
        """By convolution, `(kh, kw)`, True for its blind taps; only those that have some."""
        handles = [
            layer.register_forward_pre_hook(self._note)
            for layer in network.modules()
            if isinstance(layer, nn.Conv2d) and max(layer.stride) > 1
        ]
        training = [module for module in network.modules() if module.training]
        try:
            with torch.no_grad():
                network.eval()(image)
        finally:
            for handle in handles:
                handle.remove()
            for module in training:
                module.training = True
        self._weights: list[tuple[Tensor, Tensor]] = [
            (parameter, taps)
            for layer, taps in self.of.items()
            for parameter in layer.parameters()  # what parametrizations make the weight of, too
            if parameter.dim() == 4
        ]

    def add(self, layer: nn.Conv2d, weight: Tensor) -> None:
        """Note another weight that is used in the place of a layer's."""
        if layer in self.of:
            self._weights.append((weight, self.of[layer]))

    @torch.no_grad()
    def clear(self) -> None:
        """Set what a backward pass left at blind taps to the 0 that it is."""
        for weight, taps in self._weights:
            if weight.grad is not None:
                weight.grad.masked_fill_(taps.to(weight.device), 0.0)

    def _note(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Conv2d)
        rows, columns = (_sees(layer, axis, size) for axis, size in enumerate(inputs[0].shape[2:]))
        blind = ~(rows[:, None] & columns[None, :])
        if bool(blind.any()):
            self.of[layer] = blind


def _sees(layer: nn.Conv2d, axis: int, size: int) -> Tensor:
    """`(kernel,)`, True for taps that lie inside a map of this size for some output along one axis."""
    kernel, stride, step = layer.kernel_size[axis], layer.stride[axis], layer.dilation[axis]
    padding = 0 if isinstance(layer.padding, str) else layer.padding[axis]  # "same" is refused with strides
    outputs = (size + 2 * padding - step * (kernel - 1) - 1) // stride + 1
    places = torch.arange(outputs)[:, None] * stride - padding + torch.arange(kernel) * step
    return ((places >= 0) & (places < size)).any(dim=0)
