"""Which channels go together: torch-pruning's dependency graph, helped where it would lose its way."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch_pruning.dependency import index_mapping

from spaces.norms import TRACED_NORMS

MOST_CHANNELS = 2
"""How many times the channels of the widest layer a step may lead to; 1 in networks followed to their end."""
MOST_STEPS = 8
"""How many times the number of dependencies a group may take in steps; at most 1.4 in such networks."""


def dependency_graph(network: nn.Module, size: tuple[int, int], opaque: Iterable[str] = ()) -> Any:
    """torch-pruning's graph (Fang et al. 2023, arXiv 2301.12900) of a network in evaluation mode.

    Args:
        network: with gradients, which torch-pruning follows; changed where modules are opaque.
        size: height and width of the input in pixels.
        opaque: names of modules that are not looked into. A convolution takes the place of each, which is no
            layer of the base, so that what is joined to it stays whole.

    Its groups leave out what would be followed without end, through views and products as attention has them.
    """
    _close(network, opaque, size)
    return _Graph().build_dependency(
        network, example_inputs=torch.zeros(1, 3, *size), customized_pruners=TRACED_NORMS, verbose=False
    )


MAPPED = {
    tp.ops.OPTYPE.CONCAT: index_mapping.update_concat_index_mapping,
    tp.ops.OPTYPE.SPLIT: index_mapping.update_split_index_mapping,
    tp.ops.OPTYPE.RESHAPE: index_mapping.update_reshape_index_mapping,
    tp.ops.OPTYPE.UNBIND: index_mapping.update_unbind_index_mapping,
    tp.ops.OPTYPE.EXPAND: index_mapping.update_expand_index_mapping,
    tp.ops.OPTYPE.SLICE: index_mapping.update_slice_index_mapping,
}
"""How torch-pruning finds which channels of an operation belong to which of its inputs."""

ROWS_OR_COLUMNS = (2, 3)
"""Dimensions of maps `(N, channels, H, W)` along which all channels go on as they are."""


class _Lost(Exception):
    """Channels were followed beyond what a network can have."""


class _Graph(tp.DependencyGraph):  # type: ignore[misc]
    """Takes the parts of a split in their order; torch-pruning itself takes them as it comes upon them.

    Where it takes a view for a flattening and a product leads back there, channels multiply each time around
    and a group is never complete. Such groups are given up, and others that hold one of their layers.
    """

    def build_dependency(self, *arguments: Any, **options: Any) -> Any:
        self._misread: set[Any] = set()  # operations whose channels torch-pruning cannot tell
        try:
            super().build_dependency(*arguments, **options)
        except (ZeroDivisionError, IndexError):
            self._set_misread_aside()
        dependencies = [one for node in self.module2node.values() for one in node.dependencies]
        widest = max((max(p.shape[:2]) for p in self.model.parameters() if p.dim() > 1), default=1)
        self._most_channels, self._most_steps = MOST_CHANNELS * widest, MOST_STEPS * len(dependencies)
        self._lost: set[tuple[Any, Any]] = set()  # sides of layers: module and what cuts it
        for one in dependencies:  # torch-pruning calls all mappings of a step, one after the other
            one.index_mapping.append(partial(self._follow, one))
        return self

    def _set_misread_aside(self) -> None:
        """Have operations that torch-pruning fails on end what passes them.

        It divides by 0 for views as of shuffled channels, and looks for more parts of a split by a list of
        sizes than there are where one of them is read twice. What it made of other operations may have
        depended on these: they are looked at once more.
        """
        for node in (*self.module2node.values(),) * 2:
            if node.type not in MAPPED:
                continue
            try:
                MAPPED[node.type](self, node)
            except (ZeroDivisionError, IndexError):
                node.type = tp.ops.OPTYPE.ELEMENTWISE
                self._misread.add(node)

    def get_all_groups(self, *arguments: Any, **options: Any) -> Any:
        groups = list(super().get_all_groups(*arguments, **options))
        return [g for g in groups if not any((i.dep.target.module, i.dep.handler) in self._lost for i in g)]

    def get_pruning_group(self, module: nn.Module, pruning_fn: Any, idxs: Any) -> Any:
        self._met, self._steps = {(module, pruning_fn)}, 0
        try:
            return super().get_pruning_group(module, pruning_fn, idxs)
        except Exception:  # that, or whatever torch-pruning fails with on a view or split that it misreads
            self._lost |= self._met
            return tp.dependency.Group()  # nothing goes together, so there is no site

    def _follow(self, dependency: Any, channels: list[Any]) -> list[Any]:
        """Look at the channels that one step leads to.

        Raises:
            _Lost: there are too many of them, or too many steps, or a layer is reached that is lost already,
                or a view that nothing is known of.
        """
        if not channels:
            return channels  # the step is not taken
        self._steps += 1
        side = (dependency.target.module, dependency.handler)
        if side[0] in self._module2name:  # other channels may pass the operations between layers
            self._met.add(side)
        if self._misread & {dependency.source, dependency.target}:
            raise _Lost
        if side in self._lost or self._steps > self._most_steps or len(channels) > self._most_channels:
            raise _Lost
        return channels

    def _trace(self, *arguments: Any, **options: Any) -> Any:
        nodes = super()._trace(*arguments, **options)
        for node in nodes.values():
            joined_along = getattr(node.grad_fn, "_saved_dim", 1)
            if node.type == tp.ops.OPTYPE.CONCAT and joined_along in ROWS_OR_COLUMNS:
                node.type = tp.ops.OPTYPE.ELEMENTWISE  # torch-pruning would add up the channels of all parts
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
