"""Removal of residual blocks: a shallower network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from spaces.capabilities import Capabilities
from spaces.errors import InputError
from spaces.methods.base import Draft, Statistics
from spaces.recipe import Choice, Drop
from spaces.sites import Sites


class Dropping:
    """Whether a residual block stays.

    Runs after the methods that change layers: what they did inside a block goes with it.
    """

    kind = "drop"

    def options(self, sites: Sites, capabilities: Capabilities) -> dict[str, tuple[Choice, ...]]:
        """Kept, dropped."""
        return {name: (Drop(site=name, dropped=False), Drop(site=name)) for name in sites.residual}

    def check(self, choice: Choice, sites: Sites) -> None:
        """Raises InputError for a block that is not residual."""
        if choice.site not in sites.residual:
            raise InputError("recipe.drop.site", choice.site, "is no residual block of this detector")

    def apply(self, draft: Draft, choices: Sequence[Choice], sites: Sites, statistics: Statistics) -> None:
        """Put an identity in the place of each block; its layers keep no bit-widths."""
        blocks = [choice.site for choice in choices if isinstance(choice, Drop) and choice.dropped]
        drop_blocks(draft.network, blocks)
        draft.dropped += tuple(blocks)
        for block in blocks:
            for layer in sites.residual[block].layers:
                draft.bits.pop(layer, None)
                draft.codebooks.pop(layer, None)


def drop_blocks(network: nn.Module, blocks: Iterable[str]) -> None:
    """Replace modules, by name, by identities."""
    for block in blocks:
        network.set_submodule(block, nn.Identity())
