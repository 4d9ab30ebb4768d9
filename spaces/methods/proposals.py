"""Fewer proposals: the second stage of a detector looks at the best of them only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from spaces.capabilities import Capabilities
from spaces.errors import InputError
from spaces.methods.base import Draft, Statistics
from spaces.recipe import Choice, Proposals
from spaces.sites import Sites

SHARES = (1.0, 0.75, 0.5, 0.25, 0.125)


class ProposalCount:
    """The share of the base's proposals that are left after suppression, the best ones.

    Box head and RoIAlign run on each of them, so their time goes down in proportion. No weight changes: the
    network needs no training for it, and detections of the regions that are left stay what they were.
    """

    kind = "proposals"

    def options(self, sites: Sites, capabilities: Capabilities) -> dict[str, tuple[Choice, ...]]:
        """All of them, 3/4, 1/2, 1/4 and 1/8, as far as these are different numbers."""
        found: dict[str, tuple[Choice, ...]] = {}
        for name, site in sites.proposals.items():
            by_count = {site.kept(share): share for share in reversed(SHARES)}  # of equal ones the mildest
            shares = sorted(by_count.values(), reverse=True)
            found[name] = tuple(Proposals(site=name, share=share) for share in shares)
        return found

    def check(self, choice: Choice, sites: Sites) -> None:
        """Raises InputError for a site that has no proposals."""
        if choice.site not in sites.proposals:
            raise InputError("recipe.proposals.site", choice.site, "has no proposals")

    def apply(self, draft: Draft, choices: Sequence[Choice], sites: Sites, statistics: Statistics) -> None:
        """Set the number of proposals of each site."""
        counts = {
            choice.site: sites.proposals[choice.site].kept(choice.share)
            for choice in choices
            if isinstance(choice, Proposals)
        }
        draft.proposals.update(counts)
        set_proposals(draft.network, counts)


def set_proposals(network: nn.Module, counts: Mapping[str, int]) -> None:
    """Let modules, by name, look at so many regions."""
    for name, count in counts.items():
        network.get_submodule(name).proposals = count  # type: ignore[assignment]  # a number, no module
