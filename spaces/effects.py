"""What a recipe leaves of a detector's layers: channels, bit-widths, multiplications."""

from __future__ import annotations

from collections.abc import Mapping

from spaces.layers import LayerFacts
from spaces.methods.prune import kept_channels
from spaces.ranks import layer_ranks
from spaces.recipe import Codebook, Drop, Factorize, Gate, Proposals, Prune, Quantize, Recipe, Resize
from spaces.sites import Sites


def kept_by_site(recipe: Recipe, sites: Sites) -> dict[str, int]:
    """Channels left at the pruned sites of a recipe."""
    return {
        site: kept_channels(sites.channel[site].channels, choice.sparsity)
        for site, choice in recipe.of_kind(Prune).items()
    }


def bits_by_layer(recipe: Recipe, sites: Sites) -> dict[str, int]:
    """The bit-width that every layer runs at, 32 where nothing is chosen; gone layers are left out."""
    bits = dict.fromkeys(sites.facts, 32)
    for site, choice in recipe.of_kind(Quantize).items():
        for layer in sites.layer[site].layers:
            bits[layer] = max(choice.weight_bits, choice.activation_bits)
    for layer in layers_gone(recipe, sites):
        del bits[layer]
    return bits


def layers_gone(recipe: Recipe, sites: Sites) -> set[str]:
    """Layers of dropped blocks, and those that computed gates which are constant now."""
    blocks = [sites.residual[block].layers for block in recipe.of_kind(Drop)]
    gates = [sites.gate[block].layers for block in recipe.of_kind(Gate)]
    return {layer for layers in (*blocks, *gates) for layer in layers}


def integers_by_layer(recipe: Recipe, sites: Sites) -> dict[str, tuple[int, int]]:
    """Weight and activation bits of the layers that have 8 or less."""
    return {
        layer: (choice.weight_bits, choice.activation_bits)
        for site, choice in recipe.of_kind(Quantize).items()
        if max(choice.weight_bits, choice.activation_bits) <= 8
        for layer in sites.layer[site].layers
    }


def codebooks_by_layer(recipe: Recipe, sites: Sites) -> dict[str, int]:
    """Entries of the codebooks of the layers that have one."""
    books = recipe.of_kind(Codebook).items()
    return {layer: choice.entries for site, choice in books for layer in sites.layer[site].layers}


def widths_by_layer(recipe: Recipe, sites: Sites) -> dict[str, tuple[int, int]]:
    """Input and output channels of every layer under a recipe; none where it is dropped."""
    return sites.widths(kept_by_site(recipe, sites), layers_gone(recipe, sites))


def facts_under(recipe: Recipe, sites: Sites) -> Mapping[str, LayerFacts]:
    """The base's layers at the input size of a recipe."""
    for choice in recipe.of_kind(Resize).values():
        if sites.input is not None:
            return sites.input.smaller[choice.size]
    return sites.facts


def total_macs(recipe: Recipe, sites: Sites) -> int:
    """Multiply-accumulates of one image under a recipe.

    Factorised layers count as Tucker-2 where a spatial split, which takes no more, may be chosen.
    """
    widths, layers = widths_by_layer(recipe, sites), facts_under(recipe, sites)
    macs = {name: facts.macs(*widths[name]) for name, facts in layers.items()}
    for site, choice in recipe.of_kind(Factorize).items():
        for name in sites.layer[site].layers:
            ranks = layer_ranks(layers[name], *widths[name], choice.rank_ratio, choice.multiple)
            macs[name] = macs[name] if ranks is None else ranks[2]
    for site, fewer in recipe.of_kind(Proposals).items():
        regions = sites.proposals[site]
        for name in regions.layers:
            macs[name] = macs[name] * regions.kept(fewer.share) // regions.count
    return sum(macs.values())
