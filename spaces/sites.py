"""Sites: the places on the base graph where a choice can be made."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spaces.activations import ActivationSite, activation_sites
from spaces.best_boxes import SuppressionSite, suppression_site
from spaces.blocks import BlockSite, blocks_of
from spaces.cuts import as_many_as_hold, that_hold
from spaces.detectors.base import Detector
from spaces.gates import gate_sites
from spaces.inputs import InputSite, Size, input_site
from spaces.layers import LayerFacts, learning, trace_layers
from spaces.norms import NORMS, in_whole_groups
from spaces.proposals import ProposalSite, proposal_sites
from spaces.residual import residual_sites
from spaces.tracing import dependency_graph


@dataclass(frozen=True)
class Member:
    """One side of a layer whose channels go together with a site's.

    Attributes:
        layer: module name, or that of a parameter which a module holds beside its layers.
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
    """A dependency group: layers that must lose the same channels, `channels` of them on the base graph.

    Where the channels go through a GroupNorm its groups take their place, each `unit` channels of the layers
    that produce them: whole groups go, and those that stay compute what they did.
    """

    name: str
    channels: int
    members: tuple[Member, ...]

    @property
    def unit(self) -> int:
        """Channels of a layer that go at once; 1 without GroupNorm."""
        return min(len(m.channels) // self.channels for m in self.members)


@dataclass(frozen=True)
class LayerSite:
    """Layers that take one bit-width together: a layer with its depthwise neighbour, or siblings."""

    name: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Sites:
    """All sites of a detector by name, and the facts of its layers in order of execution.

    `input` is None where no other size of the input is on offer; see `spaces.inputs.input_site`.
    `suppression` is None where the number of boxes is not.
    """

    channel: Mapping[str, ChannelSite]
    layer: Mapping[str, LayerSite]
    facts: Mapping[str, LayerFacts]
    activation: Mapping[str, ActivationSite] = field(default_factory=dict)
    residual: Mapping[str, BlockSite] = field(default_factory=dict)
    input: InputSite | None = None
    proposals: Mapping[str, ProposalSite] = field(default_factory=dict)
    suppression: SuppressionSite | None = None
    gate: Mapping[str, BlockSite] = field(default_factory=dict)

    def widths(self, kept: Mapping[str, int], gone: Collection[str] = ()) -> dict[str, tuple[int, int]]:
        """Input and output channels of every layer when `kept` channels are left, by site (others: all).

        Layers that are `gone` have none.
        """
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
            result[name] = (0, 0) if name in gone else (inputs, outputs)
        return result


def find_sites(
    detector: Detector,
    network: nn.Module,
    max_sites: int | None = None,
    resized: Callable[[Size], Detector] | None = None,
    topk: int | None = None,
) -> Sites:
    """Trace a base network and name its sites.

    Channel sites are torch-pruning's dependency groups (Fang et al. 2023, arXiv 2301.12900), the output
    layers left out. They carry the name of the first layer that produces their channels. Layer sites are
    one layer each, a depthwise convolution joined to the layer that reads it; where that makes more than
    `max_sites` sites of both kinds, the layers of one parent module are joined. Activation sites are stages,
    residual and gate sites single blocks, proposal sites second stages. Where `resized` makes the detector
    for another size, its input is one, too; so is suppression, where `topk` boxes may go into it.
    """
    facts = trace_layers(network, detector.preprocess.size)
    facts = _replaceable(network, facts, detector.preprocess.size)
    channel = {site.name: site for site in _channel_sites(detector, network, facts)}
    channel = that_hold(network, channel, detector.preprocess.size)
    layer = {site.name: site for site in _layer_sites(facts, siblings=False)}
    if max_sites is not None and len(channel) + len(layer) > max_sites:
        layer = {site.name: site for site in _layer_sites(facts, siblings=True)}
    blocks = blocks_of(detector, copy.deepcopy(network).eval(), facts)
    return Sites(
        channel,
        layer,
        facts,
        activation_sites(detector, network, facts),
        residual_sites(blocks),
        input_site(detector.preprocess.size, facts, network, resized) if resized else None,
        proposal_sites(network, facts),
        suppression_site(detector, network, topk) if topk else None,
        gate_sites(blocks),
    )


def _replaceable(
    network: nn.Module, facts: Mapping[str, LayerFacts], size: tuple[int, int]
) -> dict[str, LayerFacts]:
    """Facts in which layers stay what they are whose weights the code around them reads, past the layers."""
    images = torch.zeros(1, 3, *size)

    def holds(some: Mapping[str, LayerFacts]) -> bool:
        draft = copy.deepcopy(network).eval()
        for name in some:
            draft.set_submodule(name, _InPlace(draft.get_submodule(name)))
        try:
            with torch.no_grad():
                draft(images)
        except Exception:  # whatever the user's code raises where a layer is none
            return False
        return True

    free = as_many_as_hold({name: layer for name, layer in facts.items() if layer.replaceable}, holds)
    return {name: replace(layer, replaceable=name in free) for name, layer in facts.items()}


class _InPlace(nn.Module):
    """Computes what a layer does, without being one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple it is no submodule

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self._layer[0](inputs)
        return output


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
    network = learning(copy.deepcopy(network).eval())
    opaque = getattr(detector, "opaque_modules", lambda _: ())(network)
    graph = dependency_graph(network, detector.preprocess.size, opaque)
    modules = dict(network.named_modules())
    names: dict[Any, str] = {module: name for name, module in modules.items()}
    names |= {p: name for name, p in network.named_parameters() if sum(side > 1 for side in p.shape) == 1}
    outputs = detector.output_layers(network)
    groups = list(graph.get_all_groups(ignored_layers=[modules[name] for name in sorted(outputs)]))
    order = {name: position for position, name in enumerate(facts)}
    found: list[tuple[str, tuple[Member, ...], int]] = []
    for group in groups:
        for part in _independent(_members(group, names, facts, outputs)):
            members = _of_whole_groups(part, modules)
            producers = [m.layer for m in members if m.side == "out" and _produces(m.layer, facts)]
            if producers:
                first = min(producers, key=lambda name: order[name])
                found.append((first, members, 1 + max(max(m.roots) for m in members)))
    found.sort(key=lambda site: order[site[0]])
    taken: dict[str, ChannelSite] = {}
    for first_layer, members, channels in found:
        name = short_name(first_layer)
        name = first_layer if name in taken else name
        taken[name] = ChannelSite(name, channels, members)
    return list(taken.values())


def _produces(layer: str, facts: Mapping[str, LayerFacts]) -> bool:
    return layer in facts and not facts[layer].depthwise


def _members(
    group: Any, names: Mapping[Any, str], facts: Mapping[str, LayerFacts], outputs: frozenset[str]
) -> list[Member]:
    """The layers of a dependency group; none where some of them cannot lose channels."""
    pairs: dict[tuple[str, Literal["out", "in"]], set[tuple[int, int]]] = defaultdict(set)
    for item in group:
        module = item.dep.target.module
        if module not in names:
            if isinstance(module, nn.Parameter):
                return []  # which of its sides holds the channels is anybody's guess
            continue  # an operation without weights
        name = names[module]
        reads = item.dep.handler.__name__.endswith("in_channels")
        side: Literal["out", "in"] = "in" if reads else "out"
        if isinstance(module, (*NORMS, nn.Parameter)) or (name in facts and facts[name].depthwise):
            side = "out"
        elif name not in facts or facts[name].groups > 1:
            return []  # grouped convolutions lose channels only group by group
        if side == "out" and name in outputs:
            return []
        pairs[name, side].update(zip(map(int, item.idxs), map(int, item.root_idxs), strict=True))
    return [
        Member(name, side, tuple(c for c, _ in sorted(found)), tuple(r for _, r in sorted(found)))
        for (name, side), found in sorted(pairs.items())
    ]


def _independent(members: Sequence[Member]) -> list[tuple[Member, ...]]:
    """Members split up where the group holds channels that need not go together.

    A group that begins at a concatenation covers all that is concatenated. Channels that the same members
    hold are one site; those of others are sites of their own, for each channel can go alone.
    """
    holders: dict[int, list[int]] = defaultdict(list)
    for k, member in enumerate(members):
        for root in sorted(set(member.roots)):
            holders[root].append(k)
    together: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for root, held in sorted(holders.items()):
        together[tuple(held)].append(root)
    parts = []
    for holding, roots in together.items():
        number = {root: k for k, root in enumerate(roots)}
        parts.append(tuple(_part(members[k], number) for k in holding))
    return parts


def _part(member: Member, number: Mapping[int, int]) -> Member:
    pairs = [(c, number[r]) for c, r in zip(member.channels, member.roots, strict=True) if r in number]
    return Member(member.layer, member.side, tuple(c for c, _ in pairs), tuple(r for _, r in pairs))


def _of_whole_groups(members: Sequence[Member], modules: Mapping[str, nn.Module]) -> tuple[Member, ...]:
    """The members with a root for each group of their GroupNorms; none where groups do not fit."""
    held = [(modules.get(m.layer), m.channels, m.roots) for m in members]
    number = in_whole_groups(held)
    if number is None:
        return ()
    return tuple(Member(m.layer, m.side, m.channels, tuple(number[r] for r in m.roots)) for m in members)


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
