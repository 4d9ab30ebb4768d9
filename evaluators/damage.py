"""Damage of choices without training: how far a compressed network's outputs are from the base's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import nn

from evaluators.bench import Bench
from evaluators.calibration import LayerRanges, narrowed
from evaluators.norms import measure_norms
from evaluators.rounding import round_layer
from evaluators.scored_damage import ScoredDamage
from evaluators.signature import int8_weight_levels
from spaces.apply import apply
from spaces.detectors.base import Outputs
from spaces.detectors.folding import by_module
from spaces.effects import bits_by_layer, codebooks_by_layer, integers_by_layer
from spaces.methods.codebook import cluster_layers
from spaces.recipe import Recipe, told_by_ap

IMAGES = 12


class Damage:
    """Distances to the base's raw outputs on calibration images of fit, by the detector's own measure.

    The base's outputs and ranges are computed once.
    """

    def __init__(self, bench: Bench, images: int = IMAGES) -> None:
        self._bench = bench
        with bench.slot.computing(), torch.no_grad():
            self._images = bench.batch(bench.fit, images)
            self._outputs: Outputs = bench.base(self._images)
            repaired: Outputs = self._repaired(copy.deepcopy(bench.base))(self._images)
            self._repaired_outputs = repaired
        self._ranges: dict[str, LayerRanges] = {}

    def of(self, recipe: Recipe) -> float:
        """The distance that a recipe causes; 0 for the identity.

        8-bit layers round their inputs and weights, 16-bit ones go through bfloat16: close to what the
        engines do, enough to tell sites apart. Networks that changed in more than bit-widths have their
        BatchNorm statistics measured anew first, on these same images: most of what fine-tuning repairs is
        a shift of statistics, and without that the damage of late layers, which it repairs well, would
        look the largest. They are compared with the base treated likewise: what the few images themselves do
        to its statistics is larger than the damage of many a choice.

        What the AP alone tells, see `ScoredDamage`, adds to the damage of the other choices.
        """
        bench = self._bench
        scored = tuple(filter(told_by_ap, recipe.choices))
        if scored:
            others = tuple(choice for choice in recipe.choices if choice not in scored)
            plain, shown = (recipe.model_copy(update={"choices": part}) for part in (others, scored))
            return self.of(plain) + self._scored.of(shown)
        draft = apply(bench.base, recipe, bench.sites, bench.statistics_for(recipe))
        network = self._repaired(draft.network) if draft.changed else draft.network
        bits = {layer: width for layer, width in bits_by_layer(recipe, bench.sites).items() if width < 32}
        books = codebooks_by_layer(recipe, bench.sites)
        if bits or books:
            simplified = bench.detector.simplified(network)
            bits, books = (by_module(network, simplified, layers) for layers in (bits, books))
            ranges = self._ranges_under(recipe, network, simplified, bits)
            network = simplified
            cluster_layers(network, books)
            for layer in bits:
                _round(network.get_submodule(layer), ranges.get(layer))
        wanted = self._repaired_outputs if draft.changed else self._outputs
        with torch.no_grad():
            return float(bench.detector.distillation(network(self._images), wanted))

    @cached_property
    def _scored(self) -> ScoredDamage:
        return ScoredDamage(self._bench)

    def _repaired(self, network: nn.Module) -> nn.Module:
        measure_norms(network, [self._images])
        return network

    def _ranges_under(
        self, recipe: Recipe, network: nn.Module, simplified: nn.Module, bits: Mapping[str, int]
    ) -> dict[str, LayerRanges]:
        """Ranges of the integer layers among those with a bit-width below 32, in a recipe's levels."""
        integers = by_module(network, simplified, integers_by_layer(recipe, self._bench.sites))
        ranges = self._ranges_of(network, [layer for layer, width in bits.items() if width <= 8])
        return {layer: narrowed(ranges[layer], *integers[layer]) for layer in ranges}

    def _ranges_of(self, network: nn.Module, layers: list[str]) -> dict[str, LayerRanges]:
        """Ranges of the base's layers, all calibrated at the first need; those of factors on the network."""
        if layers and not self._ranges:
            self._ranges = self._bench.ranges(self._bench.base, list(self._bench.sites.facts))
        factors = self._bench.ranges(network, [layer for layer in layers if layer not in self._ranges])
        return {layer: factors.get(layer) or self._ranges[layer] for layer in layers}


def _round(layer: nn.Module, ranges: LayerRanges | None) -> None:
    """Make a layer compute on rounded weights and inputs: without ranges, on those of bfloat16."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    if ranges is None:
        weight.data = weight.data.to(torch.bfloat16).float()
        layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(torch.bfloat16).float(),))
        return
    round_layer(layer, ranges, int8_weight_levels())
