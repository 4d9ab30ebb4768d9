"""Detectors of two stages: how many regions their second stage looks at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from spaces.layers import LayerFacts


@dataclass(frozen=True)
class ProposalSite:
    """A module that looks at a number of regions of an image, its attribute `proposals`.

    Attributes:
        name: of the module.
        count: regions on the base graph, the best ones after suppression.
        layers: that compute on every region, in order of execution; their positions are `count` times those
            of one region.
    """

    name: str
    count: int
    layers: tuple[str, ...]

    def kept(self, share: float) -> int:
        """Regions that are left of a share of them, at least one."""
        return max(1, round(self.count * share))


def proposal_sites(network: nn.Module, facts: Mapping[str, LayerFacts]) -> dict[str, ProposalSite]:
    """Sites by name: every module with a whole number `proposals` and layers that run on them."""
    found = {}
    for name, module in network.named_modules():
        count = getattr(module, "proposals", None)
        layers = tuple(layer for layer in facts if layer.startswith(f"{name}."))
        if isinstance(count, int) and layers:
            found[name] = ProposalSite(name, count, layers)
    return found
