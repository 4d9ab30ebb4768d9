"""Norms that keep their statistics, folded into the convolutions in front of them while a network is trained.

Such a norm only multiplies and shifts channels. As a layer of its own it passes over the activations once
forward and thrice backward, a fifth of a training step on a CPU; folded into the weights it costs next to
nothing. The network computes the same and its parameters get the same gradients, up to rounding.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from evaluators.adafactor import gradient_of
from evaluators.blind_taps import BlindTaps
from evaluators.replay import tensors_in
from spaces.detectors.base import Outputs
from spaces.detectors.folding import FOLDABLE

_Norm = nn.BatchNorm2d  # torchvision's frozen one has the same attributes


@dataclass
class _Pair:
    """A convolution and the norm behind it.

    Attributes:
        layer, norm: their names.
        weight, bias: what the convolution computes with in their place; gradients arrive here.
    """

    layer: str
    norm: str
    convolution: nn.Conv2d
    behind: _Norm
    weight: Tensor
    bias: Tensor

    def spread(self, gain: Tensor, shift: Tensor) -> None:
        """Set the folded weight and bias, by the norm's gain and shift `(O,)`."""
        torch.mul(self.convolution.weight, _by_output(gain), out=self.weight.detach())
        self.weight.grad = None
        self.bias = shift.requires_grad_()

    def forward(self, images: Tensor) -> Tensor:
        """Of the convolution, with the norm."""
        outputs: Tensor = self.convolution._conv_forward(images, self.weight, self.bias)
        return outputs

    def put_in(self) -> None:
        """Let the convolution do what both do."""
        self.convolution.forward = self.forward  # type: ignore[method-assign, assignment]
        self.behind.forward = _identity  # type: ignore[method-assign, assignment]

    def take_out(self) -> None:
        """Let each do its own again."""
        for module in (self.convolution, self.behind):
            vars(module).pop("forward", None)

    def gathered(self, gain: Tensor) -> Tensor:
        """Give the convolution's weight its gradient; returns the gain's share of it, `(O,)`."""
        gradient, weight = gradient_of(self.weight).float(), self.convolution.weight
        gains: Tensor = torch.linalg.vecdot(gradient.flatten(1), weight.detach().flatten(1))
        _give(weight, gradient.mul_(_by_output(gain)))
        return gains


class FoldedNorms:
    """A network whose norms are folded into its convolutions for each forward pass.

    Call it as the network; then, after the backward pass, `hand_on` gives the parameters their gradients and
    makes the network an ordinary one again. In between the norms stay folded, for a network that checkpoints
    activations runs parts of itself again in the backward pass. Without gradients it is ordinary at once.

    Args:
        network: its norms in evaluation mode.
        image: `(1, 3, H, W)`: run once to see which norm reads what.
        dtype: of the folded weights: what convolutions are computed in, such as autocast's.
    """

    def __init__(self, network: nn.Module, image: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self._network = network
        self._pairs = [
            _Pair(
                layer=names[0],
                norm=names[1],
                convolution=layer,
                behind=norm,
                weight=torch.empty_like(layer.weight, dtype=dtype).requires_grad_(),
                bias=torch.empty(layer.out_channels, dtype=dtype).requires_grad_(),
            )
            for names, layer, norm in _pairs(network, image)
        ]
        self._channels: _Channels
        self._blind = BlindTaps(network, image)
        for pair in self._pairs:
            self._blind.add(pair.convolution, pair.weight)

    @property
    def names(self) -> dict[str, str]:
        """The norms that are folded, by the names of their convolutions."""
        return {pair.layer: pair.norm for pair in self._pairs}

    def __call__(self, images: Tensor) -> Outputs:
        """Raw outputs of the network on images `(B, 3, H, W)`."""
        if not self._pairs:
            return self._network(images)  # type: ignore[no-any-return]
        with torch.no_grad():
            self._channels = norms = _Channels(self._pairs)
            gains, shifts = norms.split(norms.gain), norms.split(norms.shift.to(self._pairs[0].bias.dtype))
            for pair, gain, shift in zip(self._pairs, gains, shifts, strict=True):
                pair.spread(gain, shift)
        for pair in self._pairs:
            pair.put_in()
        outputs: Outputs = self._network(images)
        if not torch.is_grad_enabled():
            self._take_out()
        return outputs

    @torch.no_grad()
    def hand_on(self) -> None:
        """Turn the gradients of the folded weights and biases into those of the network's parameters."""
        self._take_out()
        self._blind.clear()
        pairs = [pair for pair in self._pairs if pair.weight.grad is not None]
        if not pairs:
            return
        norms = self._channels if len(pairs) == len(self._pairs) else _Channels(pairs)
        gain = norms.gain
        shifts = torch.cat([gradient_of(pair.bias) for pair in pairs]).float()
        gains = torch.cat([pair.gathered(one) for pair, one in zip(pairs, norms.split(gain), strict=True)])
        gains += shifts * (norms.bias - norms.mean)
        gradients = [norms.split(one) for one in (gains * norms.inverse, shifts, shifts * gain)]
        for pair, of_gain, of_shift, of_bias in zip(pairs, *gradients, strict=True):
            _give(pair.behind.weight, of_gain)
            _give(pair.behind.bias, of_shift)
            _give(pair.convolution.bias, of_bias)

    def _take_out(self) -> None:
        for pair in self._pairs:
            pair.take_out()


class _Channels:
    """What the norms of all pairs do, in one vector each of all their channels."""

    def __init__(self, pairs: list[_Pair]) -> None:
        self._sizes = [pair.convolution.out_channels for pair in pairs]
        norms = [pair.behind for pair in pairs]
        eps = [norm.eps for norm in norms]
        self.mean = self._all([norm.running_mean for norm in norms], 0.0)
        variance = self._all([norm.running_var for norm in norms], 1.0)
        variance += torch.tensor(eps).repeat_interleave(torch.tensor(self._sizes))
        self.inverse = variance.rsqrt_()
        """One over the standard deviations."""
        self.gain = self._all([norm.weight for norm in norms], 1.0).mul_(self.inverse)
        self.bias = self._all([pair.convolution.bias for pair in pairs], 0.0)
        """Of the convolutions."""
        self._own = self._all([norm.bias for norm in norms], 0.0)

    @property
    def shift(self) -> Tensor:
        return (self.bias - self.mean).mul_(self.gain).add_(self._own)

    def split(self, channels: Tensor) -> tuple[Tensor, ...]:
        """A vector of all channels by pair."""
        return torch.split(channels, self._sizes)

    def _all(self, vectors: list[Tensor | None], absent: float) -> Tensor:
        there = [
            torch.full((size,), absent) if vector is None else vector.detach()
            for size, vector in zip(self._sizes, vectors, strict=True)
        ]
        return torch.cat(there)


def _pairs(network: nn.Module, image: Tensor) -> list[tuple[tuple[str, str], nn.Conv2d, _Norm]]:
    """Convolutions whose outputs a norm reads, all of them, and nothing else does; with their names."""
    layers = {
        module: name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and type(module) is nn.Conv2d
    }
    norms = {
        module: name
        for name, module in network.named_modules()
        if isinstance(module, FOLDABLE) and type(module) in FOLDABLE and not module.training
    }
    reads = _Reads()
    made: dict[nn.Conv2d, list[int]] = defaultdict(list)
    read: dict[_Norm, list[int]] = defaultdict(list)
    handles = [
        layer.register_forward_hook(lambda m, _, output: made[m].append(reads.number(output)))
        for layer in layers
    ]
    handles += [
        norm.register_forward_pre_hook(lambda m, inputs: read[m].append(reads.number(inputs[0])))
        for norm in norms
    ]
    try:
        with torch.no_grad(), reads:
            outputs = network(image)
    finally:
        for handle in handles:
            handle.remove()
    reads.note(outputs)
    by_inputs = {tuple(numbers): norm for norm, numbers in read.items()}
    found = []
    for layer, numbers in made.items():
        norm = by_inputs.get(tuple(numbers))
        if norm is not None and all(reads.times[number] == 1 for number in numbers):
            found.append(((layers[layer], norms[norm]), layer, norm))
    return found


class _Reads(TorchFunctionMode):
    """Counts the calls that compute from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.times: dict[int, int] = defaultdict(int)
        self._alive: list[Tensor] = []  # while a tensor lives no other one has its id

    def number(self, tensor: Tensor) -> int:
        self._alive.append(tensor)
        return id(tensor)

    def note(self, value: Any) -> None:
        for tensor in tensors_in(value):
            self.times[self.number(tensor)] += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        # Others, such as `dim`, look at a tensor from outside; assignments to parts of one return None.
        if returned is None or any(True for _ in tensors_in(returned)):
            self.note((args, kwargs))
        return returned


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _by_output(channels: Tensor) -> Tensor:
    return channels.view(-1, 1, 1, 1)


def _give(parameter: Tensor | None, gradient: Tensor) -> None:
    """Add to what a parameter has, which it may be used for elsewhere."""
    if parameter is not None and parameter.requires_grad:
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
