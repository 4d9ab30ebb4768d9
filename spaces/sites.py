"""Sites: the places on the base graph where a choice can be made."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import nn

from spaces.detectors.base import Detector
from spaces.layers import LayerFacts, trace_layers

NORMS = (nn.BatchNorm2d, nn.GroupNorm)


@dataclass(frozen=True)
class Member:
    """One side of a layer whose channels go together with a site's.

    Attributes:
        layer: module name.
        side: `out` for what it produces (norms: their channels), `in` for what it reads.
        channels: indices among the layer's channels on that side.
        roots: for each of `channels`, the channel of the site that it belongs to.
    """

    layer: str
    side: Literal["out", "in"]
    channels: tuple[int, ...]
    roots: tuple[int, ...]


@dataclass(frozen=True)
class ChannelSite:
    """A dependency group: layers that must lose the same channels, `channels` of them on the base graph."""

    name: str
    channels: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class LayerSite:
    """Layers that take one bit-width together: a layer with its depthwise neighbour, or siblings."""

    name: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Sites:
    """All sites of a detector by name, and the facts of its layers in order of execution."""

    channel: Mapping[str, ChannelSite]
    layer: Mapping[str, LayerSite]
    facts: Mapping[str, LayerFacts]

    def widths(self, kept: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Input and output channels of every layer when `kept` channels are left, by site (others: all)."""
        removed: dict[tuple[str, str], int] = defaultdict(int)
        for name, count in kept.items():
            site = self.channel[name]
            for member in site.members:
                per_channel = len(member.channels) // site.channels
                removed[member.layer, member.side] += (site.channels - count) * per_channel
        result = {}
        for name, facts in self.facts.items():
            outputs = facts.outputs - removed[name, "out"]
            inputs = outputs if facts.depthwise else facts.inputs - removed[name, "in"]
            result[name] = (inputs, outputs)
        return result


def find_sites(detector: Detector, network: nn.Module, max_layer_sites: int | None = None) -> Sites:
    """Trace a base network and name its sites.

    Channel sites are torch-pruning's dependency groups (Fang et al. 2023, arXiv 2301.12900), the output
    layers left out. They carry the name of the first layer that produces their channels. Layer sites are
    one layer each, a depthwise convolution joined to the layer that reads it; where that makes more than
    `max_layer_sites`, the layers of one parent module are joined.
    """
    facts = trace_layers(network, detector.preprocess.size)
    channel = {site.name: site for site in _channel_sites(detector, network, facts)}
    layer = {site.name: site for site in _layer_sites(facts, siblings=False)}
    if max_layer_sites is not None and len(layer) > max_layer_sites:
        layer = {site.name: site for site in _layer_sites(facts, siblings=True)}
    return Sites(channel, layer, facts)


def short_name(layer: str) -> str:
    """A layer's name without the trailing parts that every layer of the family has."""
    parts = layer.split(".")
    while len(parts) > 2 and parts[-1] in ("conv", "pconv", "dconv"):
        parts.pop()
    return ".".join(parts)


def _channel_sites(
    detector: Detector, network: nn.Module, facts: Mapping[str, LayerFacts]
) -> list[ChannelSite]:
    # torch-pruning follows gradients, which a frozen base has none of.
    network = copy.deepcopy(network).eval().requires_grad_(True)
    modules = dict(network.named_modules())
    names = {module: name for name, module in modules.items()}
    outputs = detector.output_layers(network)
    graph = tp.DependencyGraph().build_dependency(
        network, example_inputs=torch.zeros(1, 3, *detector.preprocess.size)
    )
    groups = list(graph.get_all_groups(ignored_layers=[modules[name] for name in sorted(outputs)]))
    order = {name: position for position, name in enumerate(facts)}
    sites = [_site(group, names, facts, order, outputs) for group in groups]
    found = sorted((s for s in sites if s is not None), key=lambda s: order[s[0]])
    taken: dict[str, ChannelSite] = {}
    for first_layer, members, channels in found:
        name = short_name(first_layer)
        name = first_layer if name in taken else name
        taken[name] = ChannelSite(name, channels, members)
    return list(taken.values())


def _site(
    group: Any,
    names: Mapping[nn.Module, str],
    facts: Mapping[str, LayerFacts],
    order: Mapping[str, int],
    outputs: frozenset[str],
) -> tuple[str, tuple[Member, ...], int] | None:
    """A dependency group as (first producing layer, members, channels); None where it cannot be pruned."""
    channels = len(group[0].idxs)
    found: dict[tuple[str, str], Member] = {}
    for item in group:
        module = item.dep.target.module
        if module not in names:
            if isinstance(module, nn.Parameter):
                return None  # a bare parameter: nothing here says how to slice it
            continue  # an operation without weights
        name = names[module]
        side: Literal["out", "in"] = "in" if item.dep.handler.__name__.endswith("in_channels") else "out"
        if isinstance(module, NORMS):
            side = "out"
        elif name not in facts:
            return None
        elif facts[name].depthwise:
            side = "out"
        elif facts[name].groups > 1:
            return None  # grouped convolutions lose channels only group by group
        if side == "out" and name in outputs:
            return None
        member = Member(name, side, tuple(map(int, item.idxs)), tuple(map(int, item.root_idxs)))
        before = found.get((name, side))
        if before is not None and before.channels != member.channels:
            pairs = sorted(
                {
                    *zip(before.channels, before.roots, strict=True),
                    *zip(member.channels, member.roots, strict=True),
                }
            )
            member = Member(name, side, tuple(c for c, _ in pairs), tuple(r for _, r in pairs))
        found[name, side] = member
    producers = [
        name for name, side in found if side == "out" and name in facts and not facts[name].depthwise
    ]
    if not producers:
        return None
    members = tuple(sorted(found.values(), key=lambda m: (m.layer, m.side)))
    return min(producers, key=lambda name: order[name]), members, channels


def _layer_sites(facts: Mapping[str, LayerFacts], siblings: bool) -> list[LayerSite]:
    """One site a layer with its depthwise neighbour, or one a parent module."""
    joined: dict[str, list[str]] = defaultdict(list)
    waiting: list[str] = []
    for name, layer in facts.items():
        if layer.depthwise:
            waiting.append(name)  # runs right before the layer that reads it
            continue
        key = short_name(name)
        if siblings:
            key = key.rpartition(".")[0] or key
        joined[key] += [*waiting, name]
        waiting = []
    if waiting:
        joined[short_name(waiting[-1])] += waiting
    return [LayerSite(name, tuple(layers)) for name, layers in joined.items()]
