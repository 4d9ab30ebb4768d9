"""The layers of a network as data: shapes, and how much they multiply and move."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from spaces.errors import InputError
from spaces.lowrank import Factors


@dataclass(frozen=True)
class LayerFacts:
    """A convolution or linear layer of the base network, as a trace found it.

    Attributes:
        name: module name on the base graph.
        inputs, outputs: channels.
        kernel: height and width, `(1, 1)` for a linear layer.
        groups: 1, or `inputs` for a depthwise convolution.
        positions: output height x width (a linear layer: rows), of all calls: a head may be shared by levels
            or look at one region after another.
        bias: whether it has one.
        read, written: height and width of what it reads and writes (a linear layer: rows, 1; several calls
            or regions: all their positions, 1).
        replaceable: whether another module may take its place.
    """

    name: str
    inputs: int
    outputs: int
    kernel: tuple[int, int]
    groups: int
    positions: int
    bias: bool
    read: tuple[int, int] = (1, 1)
    written: tuple[int, int] = (1, 1)
    replaceable: bool = True

    @property
    def depthwise(self) -> bool:
        """One filter a channel."""
        return self.groups > 1 and self.groups == self.inputs == self.outputs

    def macs(self, inputs: int, outputs: int) -> int:
        """Multiply-accumulates of one image when `inputs` and `outputs` channels are left."""
        if not outputs:
            return 0
        groups = outputs if self.depthwise else self.groups
        return outputs * (inputs // groups) * math.prod(self.kernel) * self.positions


def is_layer(module: nn.Module) -> bool:
    """True for what holds a weight that multiplies: the layers that sites are made of."""
    return isinstance(module, nn.Conv2d | nn.Linear)


def frozen_parameters(network: nn.Module) -> frozenset[str]:
    """Names of the parameters that a network as it was built does not want to learn, such as a fixed filter.

    None where it wants to learn nothing at all: that was built for inference and says nothing of training.
    """
    learns = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    return frozenset(name for name, wanted in learns.items() if not wanted and any(learns.values()))


def learning(network: nn.Module, frozen: Collection[str] = ()) -> nn.Module:
    """The network, in place, with gradients for all parameters that can have them: whole numbers cannot.

    Those of the base that are `frozen` have none, and neither have the factors that they became.
    """
    modules = dict(network.named_modules())
    for name, parameter in network.named_parameters():
        learns = parameter.is_floating_point() and _in_base(name, modules) not in frozen
        parameter.requires_grad_(learns)
    return network


def _in_base(name: str, modules: Mapping[str, nn.Module]) -> str:
    """What a parameter of a factor is called in the layer that was factorised; other names stay."""
    factor, _, kind = name.rpartition(".")
    layer = factor.rpartition(".")[0]
    return f"{layer}.{kind}" if isinstance(modules.get(layer), Factors) else name


def trace_layers(network: nn.Module, size: tuple[int, int]) -> dict[str, LayerFacts]:
    """Facts of every layer that runs, in the order of execution, by module name.

    Args:
        network: takes `(1, 3, H, W)`; its mode is left as it was.
        size: height and width of the input in pixels.

    Raises:
        InputError: a layer is called by keyword, where nothing can be put before or behind it.
    """
    found: dict[str, LayerFacts] = {}
    fixed = _fixed(network)

    def record(name: str) -> object:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not inputs:
                remedy = "is called with input=...; call layers without the keyword"
                raise InputError("model", name, remedy)
            facts = replace(_facts(name, module, inputs[0], output), replaceable=name not in fixed)
            found[name] = _both(found[name], facts) if name in found else facts

        return hook

    handles = [
        module.register_forward_hook(record(name))
        for name, module in network.named_modules()
        if is_layer(module)
    ]
    training = network.training
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, *size))
    finally:
        network.train(training)
        for handle in handles:
            handle.remove()
    return found


READ_BY_PARENT = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Compute with the weights of their layers, past the layers."""


def _fixed(network: nn.Module) -> set[str]:
    """Layers that stay what they are: under two names, read by the module that they are in, or of a class of
    the user's own, which may compute anything.
    """
    count = Counter(id(module) for _, module in network.named_modules(remove_duplicate=False))
    named = dict(network.named_modules())
    return {
        name
        for name, module in named.items()
        if count[id(module)] > 1
        or isinstance(named[name.rpartition(".")[0]], READ_BY_PARENT)
        or type_before_parametrizations(module) not in (nn.Conv2d, nn.Linear)
    }


def count_macs(network: nn.Module, size: tuple[int, int]) -> int:
    """Multiply-accumulates of one image, of the layers that a network has; arguments as `trace_layers`."""
    return sum(layer.macs(layer.inputs, layer.outputs) for layer in trace_layers(network, size).values())


def _both(first: LayerFacts, second: LayerFacts) -> LayerFacts:
    """Facts of a layer that is called twice."""
    read, written = (
        math.prod(a) + math.prod(b) for a, b in ((first.read, second.read), (first.written, second.written))
    )
    return replace(first, positions=first.positions + second.positions, read=(read, 1), written=(written, 1))


def _extent(maps: Tensor) -> tuple[int, int]:
    """Height and width of a map `(1, C, H, W)` or `(C, H, W)`; of several, all positions in a column."""
    *batch, _, height, width = (int(side) for side in maps.shape)
    rows = math.prod(batch)
    return (height, width) if rows == 1 else (rows * height * width, 1)


def _facts(name: str, module: nn.Module, source: Tensor, output: Tensor) -> LayerFacts:
    bias = module.bias is not None
    if isinstance(module, nn.Conv2d):
        kernel = (int(module.kernel_size[0]), int(module.kernel_size[1]))
        read, written = (_extent(x) for x in (source, output))
        return LayerFacts(
            name, module.in_channels, module.out_channels, kernel, module.groups, math.prod(written), bias,
            read, written,
        )  # fmt: skip
    assert isinstance(module, nn.Linear)
    rows = int(output.numel() // module.out_features)
    return LayerFacts(
        name, module.in_features, module.out_features, (1, 1), 1, rows, bias, (rows, 1), (rows, 1)
    )
