"""Blocks that run once and keep the shape of what they take: what they compute tells what they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spaces.detectors.base import Detector
from spaces.layers import LayerFacts


@dataclass(frozen=True)
class Block:
    """A module with layers inside, and what it made of a noisy image.

    Attributes:
        name: of the module.
        module: itself, in evaluation mode; not to be changed.
        layers: inside it, in order of execution.
        read, written: one tensor each, of the same shape.
    """

    name: str
    module: nn.Module
    layers: tuple[str, ...]
    read: Tensor
    written: Tensor


def blocks_of(detector: Detector, network: nn.Module, facts: Mapping[str, LayerFacts]) -> list[Block]:
    """The blocks of a network in evaluation mode, in order of execution.

    Modules that run more than once, share weights with others or hold output layers are none.
    """
    fixed = detector.output_layers(network)
    layers = {
        name: tuple(layer for layer in facts if layer.startswith(f"{name}."))
        for name, module in network.named_modules()
        if name and any(True for _ in module.children())
    }
    inside = {name: held for name, held in layers.items() if held and fixed.isdisjoint(held)}
    found = []
    for name, pairs in _calls(network, detector.preprocess.size, list(inside)).items():
        if len(pairs) == 1 and not _shares_weights(network, name):
            read, written = pairs[0]
            if isinstance(read, Tensor) and isinstance(written, Tensor) and read.shape == written.shape:
                found.append(Block(name, network.get_submodule(name), inside[name], read, written))
    order = {layer: position for position, layer in enumerate(facts)}
    return sorted(found, key=lambda block: order[block.layers[0]])


@dataclass(frozen=True)
class BlockSite:
    """A block that may be replaced.

    Attributes:
        name: of the module.
        layers: inside it, in order of execution.
    """

    name: str
    layers: tuple[str, ...]


def innermost(blocks: list[Block], wanted: Callable[[Block], bool]) -> dict[str, BlockSite]:
    """The wanted blocks that hold no other wanted one, by name, in order of execution."""
    kept = [block for block in blocks if wanted(block)]
    alone = [b for b in kept if not any(other.name.startswith(f"{b.name}.") for other in kept)]
    return {block.name: BlockSite(block.name, block.layers) for block in alone}


def _calls(network: nn.Module, size: tuple[int, int], names: list[str]) -> dict[str, list[tuple[Any, Any]]]:
    """What each module takes (one tensor, or nothing that counts) and returns, call by call."""
    calls: dict[str, list[tuple[Any, Any]]] = {name: [] for name in sorted(names)}
    taken: dict[str, Any] = {}

    def before(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            alone = len(inputs) == 1 and not keywords and isinstance(inputs[0], Tensor)
            taken[name] = inputs[0].clone() if alone else None  # blocks may write into their input

        return hook

    def after(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            calls[name].append((taken[name], output.clone() if isinstance(output, Tensor) else None))

        return hook

    handles = []
    for name in calls:
        module = network.get_submodule(name)
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network(images)
    for handle in handles:
        handle.remove()
    return calls


def _shares_weights(network: nn.Module, name: str) -> bool:
    """True where a block's weights are also those of a module outside it."""
    inside = {id(p) for p in network.get_submodule(name).parameters()}
    outside = (p for n, p in network.named_parameters(remove_duplicate=False) if not n.startswith(f"{name}."))
    return any(id(p) in inside for p in outside)
