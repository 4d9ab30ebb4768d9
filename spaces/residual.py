"""Residual blocks: modules that add something to their input, and can go without anything else changing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spaces.calls import block_calls, shares_weights
from spaces.detectors.base import Detector
from spaces.layers import LayerFacts


@dataclass(frozen=True)
class ResidualSite:
    """A block that can be left out.

    Attributes:
        name: of the module.
        layers: inside it.
    """

    name: str
    layers: tuple[str, ...]


def residual_sites(
    detector: Detector, network: nn.Module, facts: Mapping[str, LayerFacts]
) -> dict[str, ResidualSite]:
    """Residual blocks by module name, innermost ones only, in order of execution.

    A block is residual where it gives back its input once all its weights are 0: `x + f(x)` does, and so does
    `relu(x + f(x))` of what is not negative. That needs no knowledge of the family. Blocks that run more than
    once, share weights with others or hold output layers are left alone.
    """
    network = copy.deepcopy(network).eval()
    fixed = detector.output_layers(network)
    layers = {
        name: tuple(layer for layer in facts if layer.startswith(f"{name}."))
        for name, module in network.named_modules()
        if name and any(True for _ in module.children())
    }
    calls = block_calls(
        network, detector.preprocess.size, {name for name, inside in layers.items() if inside}
    )
    found: dict[str, ResidualSite] = {}
    for name, pairs in calls.items():
        inside = layers[name]
        if len(pairs) == 1 and fixed.isdisjoint(inside) and not shares_weights(network, name):
            read, written = pairs[0]
            same = isinstance(read, Tensor) and isinstance(written, Tensor) and read.shape == written.shape
            if same and _gives_back(network.get_submodule(name), read):
                found[name] = ResidualSite(name, inside)
    innermost = [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
    order = {layer: position for position, layer in enumerate(facts)}
    innermost.sort(key=lambda name: order[found[name].layers[0]])
    return {name: found[name] for name in innermost}


def _gives_back(block: nn.Module, read: Tensor) -> bool:
    """True where a block without weights is the identity on what it reads."""
    silent = copy.deepcopy(block).eval()
    state: list[Tensor] = list(silent.parameters())
    # Frozen norms hold scale and shift as buffers.
    state += [b for n, b in silent.named_buffers() if n.rpartition(".")[2] in ("weight", "bias")]
    with torch.no_grad():
        for tensor in state:
            tensor.zero_()
        return bool(read.any()) and bool(torch.equal(silent(read.clone()), read))
