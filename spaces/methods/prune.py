"""Structured pruning: the least important channels of a dependency group are removed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spaces.capabilities import Capabilities
from spaces.errors import InputError
from spaces.methods.base import Draft, Statistics
from spaces.recipe import Choice, Prune
from spaces.sites import ChannelSite, Sites
from spaces.slicing import channels_left, part_named, slice_layers

MAX_SPARSITY = 0.875
MAX_OPTIONS = 8


class Pruning:
    """Sparsity per channel site; what is left is a multiple of the target's granule."""

    kind = "prune"

    def options(self, sites: Sites, capabilities: Capabilities) -> dict[str, tuple[Choice, ...]]:
        """Up to eight sparsities a site, from 0 to at most 0.875, even steps of whole granules."""
        return {
            name: tuple(
                Prune(site=name, sparsity=s)
                for s in sparsities(site.channels, math.ceil(capabilities.channel_granule / site.unit))
            )
            for name, site in sites.channel.items()
        }

    def check(self, choice: Choice, sites: Sites) -> None:
        """Raises InputError for a site that is no channel site, or where no channel would be left."""
        assert isinstance(choice, Prune)
        site = sites.channel.get(choice.site)
        if site is None:
            raise InputError("recipe.prune.site", choice.site, "is no channel site of this detector")
        if kept_channels(site.channels, choice.sparsity) < 1:
            raise InputError(f"recipe.prune.{choice.site}.sparsity", choice.sparsity, "leaves no channel")

    def apply(self, draft: Draft, choices: Sequence[Choice], sites: Sites, statistics: Statistics) -> None:
        """Remove channels everywhere at once, by indices of the base graph."""
        kept: dict[str, Tensor] = {}
        for choice in choices:
            assert isinstance(choice, Prune)
            site = sites.channel[choice.site]
            count = kept_channels(site.channels, choice.sparsity)
            scores = importance(site, draft.network, statistics)
            # Stable, so that equal scores fall the same way everywhere.
            best = torch.argsort(scores, descending=True, stable=True)[:count]
            kept[choice.site] = best.sort().values
        draft.channels.update(channels_left(draft.network, sites.channel, kept))
        slice_layers(draft.network, draft.channels)


def sparsities(channels: int, granule: int) -> list[float]:
    """Sparsities 0, s, 2s ... that leave whole granules; only 0 where there is nothing to take.

    At most `MAX_OPTIONS` of them, none above `MAX_SPARSITY`. Where `channels` is no multiple of the granule
    the first step takes the rest.
    """
    step = granule * math.ceil(channels / granule / MAX_OPTIONS)
    least = max(granule, math.ceil(channels * (1 - MAX_SPARSITY) - 1e-9))
    counts = [channels, *range((math.ceil(channels / step) - 1) * step, least - 1, -step)]
    return [round(1 - count / channels, 6) for count in counts]


def kept_channels(channels: int, sparsity: float) -> int:
    """How many channels a sparsity leaves."""
    return round(channels * (1 - sparsity))


def importance(site: ChannelSite, network: nn.Module, statistics: Statistics) -> Tensor:
    """Importance `(channels,)` of a site's channels.

    With statistics (Taylor scores, Molchanov et al. 2019, arXiv 1906.10771, or scales of norms) their sum
    over the members that produce the channels. Without, the mean over all members of the L2 norms of their
    slices, each member scaled to mean 1 (group L2, Fang et al. 2023, arXiv 2301.12900).
    """
    total = torch.zeros(site.channels, dtype=torch.float64)
    measured = [m for m in site.members if m.side == "out" and m.layer in statistics]
    if measured:
        for member in measured:
            _add(total, member.channels, member.roots, statistics[member.layer].double())
        return total
    for member in site.members:
        part = part_named(network, member.layer)
        weight = part.flatten() if isinstance(part, nn.Parameter) else getattr(part, "weight", None)
        if weight is None:
            continue
        weight = weight.detach().double()
        if member.side == "in" and weight.dim() > 1:
            weight = weight.transpose(0, 1)
        norms = weight.flatten(1).norm(dim=1) if weight.dim() > 1 else weight.abs()
        one = torch.zeros_like(total)
        _add(one, member.channels, member.roots, norms)
        total += one / one.mean().clamp_min(1e-12)
    return total


def _add(total: Tensor, channels: Sequence[int], roots: Sequence[int], values: Tensor) -> None:
    total.index_add_(0, torch.tensor(roots), values[torch.tensor(channels)].to(total))
