"""Structured pruning: the least important channels of a dependency group are removed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from spaces.capabilities import Capabilities
from spaces.errors import InputError
from spaces.methods.base import Draft, LayerChannels, Statistics
from spaces.recipe import Choice, Prune
from spaces.sites import ChannelSite, Sites

MAX_SPARSITY = 0.875
MAX_OPTIONS = 8


class Pruning:
    """Sparsity per channel site; what is left is a multiple of the target's granule."""

    kind = "prune"

    def options(self, sites: Sites, capabilities: Capabilities) -> dict[str, tuple[Choice, ...]]:
        """Up to eight sparsities a site, from 0 to at most 0.875, even steps of whole granules."""
        return {
            name: tuple(
                Prune(site=name, sparsity=s) for s in sparsities(site.channels, capabilities.channel_granule)
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
        draft.channels.update(channels_left(draft.network, sites, kept))
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

    With statistics (Taylor scores, Molchanov et al. 2019, arXiv 1906.10771) their sum over the members
    that produce the channels. Without, the mean over all members of the L2 norms of their slices, each
    member scaled to mean 1 (group L2, Fang et al. 2023, arXiv 2301.12900).
    """
    total = torch.zeros(site.channels, dtype=torch.float64)
    measured = [m for m in site.members if m.side == "out" and m.layer in statistics]
    if measured:
        for member in measured:
            _add(total, member.channels, member.roots, statistics[member.layer].double())
        return total
    for member in site.members:
        module = network.get_submodule(member.layer)
        weight = getattr(module, "weight", None)
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


def channels_left(network: nn.Module, sites: Sites, kept: Mapping[str, Tensor]) -> dict[str, LayerChannels]:
    """Indices of every touched layer's channels that are left, from the sites' kept channels."""
    removed: dict[str, dict[str, set[int]]] = defaultdict(lambda: {"out": set(), "in": set()})
    for name, indices in kept.items():
        alive = set(indices.tolist())
        for member in sites.channel[name].members:
            removed[member.layer][member.side].update(
                c for c, root in zip(member.channels, member.roots, strict=True) if root not in alive
            )
    left = {}
    for layer, gone in removed.items():
        inputs, outputs = _widths(network.get_submodule(layer))
        left[layer] = LayerChannels(_without(outputs, gone["out"]), _without(inputs, gone["in"]))
    return left


def _widths(module: nn.Module) -> tuple[int, int]:
    """Input and output channels; a norm has as many of either."""
    match module:
        case nn.Conv2d():
            return module.in_channels, module.out_channels
        case nn.Linear():
            return module.in_features, module.out_features
        case nn.BatchNorm2d():
            return module.num_features, module.num_features
        case nn.GroupNorm():
            return module.num_channels, module.num_channels
        case _:
            raise TypeError(f"cannot prune a {type(module).__name__}")


def _without(total: int, gone: set[int]) -> tuple[int, ...] | None:
    return tuple(c for c in range(total) if c not in gone) if gone else None


def slice_layers(network: nn.Module, channels: Mapping[str, LayerChannels]) -> None:
    """Cut layers down, in place, to the channels that are left.

    Works on the base network's shapes, whatever its weights, so a stored plan rebuilds a pruned network
    without the library that found the dependencies.
    """
    for name, left in channels.items():
        module = network.get_submodule(name)
        match module:
            case nn.Conv2d():
                _slice_conv(module, left)
            case nn.Linear():
                _slice_parameter(module, "weight", left.into, dim=1)
                _slice_parameter(module, "weight", left.out)
                _slice_parameter(module, "bias", left.out)
                module.out_features, module.in_features = module.weight.shape
            case nn.BatchNorm2d():
                for tensor in ("weight", "bias", "running_mean", "running_var"):
                    _slice_parameter(module, tensor, left.out)
                if left.out is not None:
                    module.num_features = len(left.out)
            case nn.GroupNorm():
                _slice_parameter(module, "weight", left.out)
                _slice_parameter(module, "bias", left.out)
                if left.out is not None:
                    module.num_channels = len(left.out)
            case _:
                raise InputError("channels", name, f"cannot slice a {type(module).__name__}")


def _slice_conv(conv: nn.Conv2d, left: LayerChannels) -> None:
    depthwise = conv.groups > 1
    _slice_parameter(conv, "weight", left.out)
    _slice_parameter(conv, "bias", left.out)
    if not depthwise:
        _slice_parameter(conv, "weight", left.into, dim=1)
    conv.out_channels = int(conv.weight.shape[0])
    if depthwise:
        conv.groups = conv.in_channels = conv.out_channels
    else:
        conv.in_channels = int(conv.weight.shape[1])


def _slice_parameter(module: nn.Module, name: str, left: tuple[int, ...] | None, dim: int = 0) -> None:
    tensor = getattr(module, name)
    if left is None or tensor is None:
        return
    cut = tensor.detach().index_select(dim, torch.tensor(left, device=tensor.device)).clone()
    if isinstance(tensor, nn.Parameter):
        setattr(module, name, nn.Parameter(cut, requires_grad=tensor.requires_grad))
    else:
        setattr(module, name, cut)
