"""How many boxes go into suppression: one choice for the whole recipe."""

from __future__ import annotations

from collections.abc import Sequence

from spaces.best_boxes import SUPPRESSION
from spaces.capabilities import Capabilities
from spaces.errors import InputError
from spaces.methods.base import Draft, Statistics
from spaces.recipe import Choice, TopK
from spaces.sites import Sites

COUNTS = (500, 200, 100, 50)


class PreNmsTopK:
    """Fewer boxes that are decoded, sorted and compared with one another; Postprocess's `pre_nms_topk`.

    The network is not touched. What follows it takes a quarter of the time of a fast candidate, most of it in
    proportion to this number; and what the last hundreds of boxes add to the AP is told by the AP alone.
    """

    kind = "topk"

    def options(self, sites: Sites, capabilities: Capabilities) -> dict[str, tuple[Choice, ...]]:
        """The base's own number, then smaller ones."""
        if sites.suppression is None:
            return {}
        fewer = (TopK(count=count) for count in COUNTS if count <= 0.75 * sites.suppression.limit)
        return {SUPPRESSION: (TopK(), *fewer)}

    def check(self, choice: Choice, sites: Sites) -> None:
        """Raises InputError for another site than the suppression, and for more boxes than there are."""
        assert isinstance(choice, TopK)
        if choice.site != SUPPRESSION:
            raise InputError("recipe.topk.site", choice.site, f"must be {SUPPRESSION}")
        if sites.suppression is not None and choice.count > sites.suppression.limit:
            raise InputError("recipe.topk", choice.count, f"the base has {sites.suppression.limit}")

    def apply(self, draft: Draft, choices: Sequence[Choice], sites: Sites, statistics: Statistics) -> None:
        """Note the number."""
        for choice in choices:
            assert isinstance(choice, TopK)
            draft.topk = choice.count or None
