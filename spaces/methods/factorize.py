"""Low rank: a layer is replaced by two or three thinner ones (SVD, Tucker-2, or a spatial split)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from spaces.capabilities import Capabilities
from spaces.errors import InputError
from spaces.layers import LayerFacts, is_layer
from spaces.lowrank import Factored, errors, factorised, shaped
from spaces.methods.base import Draft, Statistics
from spaces.ranks import layer_ranks
from spaces.recipe import Choice, Factorize
from spaces.sites import Sites

RATIOS = (0.75, 0.5, 0.375, 0.25)


class Factorization:
    """Rank per layer site, relative to the full rank of each of its layers after pruning.

    Layers whose factors would not take clearly fewer multiplications stay whole: depthwise and grouped
    ones, those with few channels, and any for which the rank is too high; see `spaces.ranks`.
    """

    kind = "factorize"

    def options(self, sites: Sites, capabilities: Capabilities) -> dict[str, tuple[Choice, ...]]:
        """Full rank, then those of `RATIOS` that make some layer of the site cheaper, each another one.

        Sites without any are left out.
        """
        offered: dict[str, tuple[Choice, ...]] = {}
        for name in sites.layer:
            choices = [Factorize(site=name, rank_ratio=1.0, multiple=capabilities.channel_granule)]
            last = _base_ranks(choices[0], sites)
            for ratio in RATIOS:
                choice = choices[0].model_copy(update={"rank_ratio": ratio})
                ranks = _base_ranks(choice, sites)
                if ranks != last:
                    choices.append(choice)
                    last = ranks
            if len(choices) > 1:
                offered[name] = tuple(choices)
        return offered

    def check(self, choice: Choice, sites: Sites) -> None:
        """Raises InputError for no layer site, a rank above full, or a site that it would leave as it is."""
        assert isinstance(choice, Factorize)
        if choice.site not in sites.layer:
            raise InputError("recipe.factorize.site", choice.site, "is no layer site of this detector")
        field = f"recipe.factorize.{choice.site}.rank_ratio"
        if not 0 < choice.rank_ratio <= 1:
            raise InputError(field, choice.rank_ratio, "choose above 0 and at most 1, which is full rank")
        if choice.rank_ratio < 1 and not any(_base_ranks(choice, sites)):
            raise InputError(field, choice.rank_ratio, "makes no layer there cheaper")

    def apply(self, draft: Draft, choices: Sequence[Choice], sites: Sites, statistics: Statistics) -> None:
        """Replace the layers of each site, after the pruned shape and weight that they have."""
        for choice in choices:
            assert isinstance(choice, Factorize)
            for name in sites.layer[choice.site].layers:
                layer = draft.network.get_submodule(name)
                assert isinstance(layer, nn.Conv2d | nn.Linear)
                plan = best_plan(layer, sites.facts[name], choice)
                if plan is not None:
                    draft.network.set_submodule(name, factorised(layer, plan))
                    draft.factors[name] = plan


def best_plan(layer: nn.Conv2d | nn.Linear, facts: LayerFacts, choice: Factorize) -> Factored | None:
    """How to factorise a layer, None where it stays whole.

    SVD for 1x1 and linear layers. For k x k ones Tucker-2 of these ranks, or, where it is closer to the
    layer's weight, the spatial split of the highest rank that multiplies no more.
    """
    outputs, inputs = layer.weight.shape[:2]
    ranks = layer_ranks(facts, int(inputs), int(outputs), choice.rank_ratio, choice.multiple)
    if ranks is None:
        return None
    rank_in, rank_out, macs = ranks
    if math.prod(facts.kernel) == 1:
        return Factored("svd", (rank_in,))
    tucker = Factored("tucker", (rank_in, rank_out))
    if min(facts.kernel) == 1:
        return tucker
    (tall, wide), (height, width) = facts.kernel, facts.written
    each = inputs * tall * height * facts.read[1] + outputs * wide * height * width
    full = min(inputs * tall, outputs * wide)
    rank = min(int(macs // each), full) // choice.multiple * choice.multiple
    if rank < choice.multiple:
        return tucker
    left = errors(layer.weight, {"tucker": tucker.ranks, "split": (rank,)})
    return Factored("split", (rank,)) if left["split"] < left["tucker"] else tucker


def replace_layers(network: nn.Module, factors: Mapping[str, Factored]) -> None:
    """Put factors of the stored shapes in the place of layers, by name; their weights are not set."""
    for name, plan in factors.items():
        layer = network.get_submodule(name)
        if not is_layer(layer):
            raise InputError("factors", name, f"cannot factorise a {type(layer).__name__}")
        network.set_submodule(name, shaped(layer, plan))  # type: ignore[arg-type]


def _base_ranks(choice: Factorize, sites: Sites) -> tuple[tuple[int, int] | None, ...]:
    """Ranks of each layer of a site at its base shape; None where it stays whole."""
    found = []
    for name in sites.layer[choice.site].layers:
        facts = sites.facts[name]
        ranks = layer_ranks(facts, facts.inputs, facts.outputs, choice.rank_ratio, choice.multiple)
        found.append(None if ranks is None else ranks[:2])
    return tuple(found)
