"""What the tracer must be told about norms, and which of their channels go together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch_pruning as tp
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

NORMS = (nn.BatchNorm2d, nn.GroupNorm, FrozenBatchNorm2d)
"""Norms that can lose channels."""


class FrozenNormPruner(tp.BasePruningFunc):  # type: ignore[misc]  # torch-pruning has no types
    """Tells torch-pruning that a frozen norm has as many outputs as inputs; the graph is only read."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Layers are cut by `spaces.slicing`."""
        raise NotImplementedError

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: FrozenBatchNorm2d) -> int:
        """Number of channels."""
        return len(layer.weight)

    get_in_channels = get_out_channels


TRACED_NORMS: Mapping[type[nn.Module], tp.BasePruningFunc] = {FrozenBatchNorm2d: FrozenNormPruner()}
"""Norms that torch-pruning does not know by itself, as its `customized_pruners`."""


def in_whole_groups(
    members: Sequence[tuple[nn.Module | None, Sequence[int], Sequence[int]]],
) -> list[int] | None:
    """Roots of a dependency group joined so that its GroupNorms lose whole groups.

    Groups that stay then compute what they did. A norm with one group over all channels has none to join.

    Args:
        members: for each layer of the group its module, its channels and the root of each.

    Returns:
        The number of each root's unit, from 0 on, which is the root itself where no norm has groups. None
        where groups do not fit: only a part of one is here, or units would be of different sizes.
    """
    unit = list(range(1 + max((max(roots) for _, _, roots in members), default=-1)))
    for norm, channels, roots in members:
        if not isinstance(norm, nn.GroupNorm) or norm.num_groups == 1:
            continue
        size = norm.num_channels // norm.num_groups
        groups: dict[int, list[int]] = defaultdict(list)
        for channel, root in zip(channels, roots, strict=True):
            groups[channel // size].append(root)
        for group in groups.values():
            if len(group) != size:
                return None
            merged = {unit[root] for root in group}
            unit = [min(merged) if u in merged else u for u in unit]
    number = {u: k for k, u in enumerate(sorted(set(unit)))}
    units = [number[u] for u in unit]
    if len(number) == len(unit):
        return units
    for _, _, roots in members:
        held = Counter(units[root] for root in roots)
        if len(held) != len(number) or len(set(held.values())) != 1:
            return None
    return units
