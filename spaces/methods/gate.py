"""Squeeze-and-excitation without the squeeze: gates that are the same for every image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spaces.capabilities import Capabilities
from spaces.errors import InputError
from spaces.gates import gates_at_rest, replace_gates
from spaces.methods.base import Draft, Statistics
from spaces.recipe import Choice, Gate
from spaces.sites import Sites


class ConstantGates:
    """Whether a block computes its gates from each image, or has learnt ones.

    A block costs little arithmetic, but five operations in a row on next to nothing. The gates begin at their
    means over images, where `Statistics` has them, and are trained with the rest; in the exported file they
    are part of the next convolution. Runs after the methods that change layers.
    """

    kind = "gate"

    def options(self, sites: Sites, capabilities: Capabilities) -> dict[str, tuple[Choice, ...]]:
        """Computed, constant."""
        return {name: (Gate(site=name, constant=False), Gate(site=name)) for name in sites.gate}

    def check(self, choice: Choice, sites: Sites) -> None:
        """Raises InputError for a block that gates nothing."""
        if choice.site not in sites.gate:
            raise InputError("recipe.gate.site", choice.site, "is no squeeze-and-excitation block")

    def apply(self, draft: Draft, choices: Sequence[Choice], sites: Sites, statistics: Statistics) -> None:
        """Replace the blocks; their layers keep no bit-widths."""
        blocks = [choice.site for choice in choices if isinstance(choice, Gate) and choice.constant]
        for block in blocks:
            gates = _gates(draft, block, sites, statistics)
            replace_gates(draft.network, {block: gates})
            draft.gates[block] = len(gates)
            for layer in sites.gate[block].layers:
                draft.bits.pop(layer, None)
                draft.codebooks.pop(layer, None)
                draft.channels.pop(layer, None)
                draft.factors.pop(layer, None)


def _gates(draft: Draft, block: str, sites: Sites, statistics: Statistics) -> Tensor:
    """Of the channels that are left."""
    last = sites.gate[block].layers[-1]
    kept = draft.channels[last].out if last in draft.channels else None
    indices = torch.arange(sites.facts[last].outputs) if kept is None else torch.tensor(kept)
    if block in statistics:
        return statistics[block].float()[indices]
    return gates_at_rest(draft.network.get_submodule(block), len(indices))
