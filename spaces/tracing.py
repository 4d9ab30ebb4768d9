"""Which channels go together: torch-pruning's dependency graph, helped where it would lose its way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from spaces.norms import TRACED_NORMS


def dependency_graph(network: nn.Module, size: tuple[int, int], opaque: Iterable[str] = ()) -> Any:
    """torch-pruning's graph (Fang et al. 2023, arXiv 2301.12900) of a network in evaluation mode.

    Args:
        network: with gradients, which torch-pruning follows; changed where modules are opaque.
        size: height and width of the input in pixels.
        opaque: names of modules that are not looked into. A convolution takes the place of each, which is no
            layer of the base, so that what is joined to it stays whole. Channels would otherwise be followed
            through views and products, where torch-pruning finds no end.
    """
    _close(network, opaque, size)
    return _Graph().build_dependency(
        network, example_inputs=torch.zeros(1, 3, *size), customized_pruners=TRACED_NORMS, verbose=False
    )


class _Graph(tp.DependencyGraph):  # type: ignore[misc]
    """Takes the parts of a split in their order; torch-pruning itself takes them as it comes upon them."""

    def _trace(self, *arguments: Any, **options: Any) -> Any:
        nodes = super()._trace(*arguments, **options)
        for node in nodes.values():
            if "split" not in type(node.grad_fn).__name__.lower():
                continue
            parts = [
                [part for function, part in reader.grad_fn.next_functions if function is node.grad_fn]
                for reader in node.outputs
            ]
            if all(len(found) == 1 for found in parts):
                order = sorted((part, k) for k, (part,) in enumerate(parts))
                node.outputs = [node.outputs[k] for _, k in order]
        return nodes


def _close(network: nn.Module, names: Iterable[str], size: tuple[int, int]) -> None:
    """Put a convolution of the same channels in the place of each module, in place."""
    found: dict[str, nn.Module] = {}
    handles = []
    for name in names:

        def stand_in(_: nn.Module, read: tuple[Any, ...], written: Any, name: str = name) -> None:
            found[name] = nn.Conv2d(read[0].shape[1], written.shape[1], 1)

        handles.append(network.get_submodule(name).register_forward_hook(stand_in))
    if not handles:
        return
    with torch.no_grad():
        network(torch.zeros(1, 3, *size))
    for handle in handles:
        handle.remove()
    for name, module in found.items():
        network.set_submodule(name, module)
