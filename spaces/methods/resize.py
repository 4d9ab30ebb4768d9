"""The size of the input: one choice for the whole recipe."""

from __future__ import annotations

from collections.abc import Sequence

from spaces.capabilities import Capabilities
from spaces.errors import InputError
from spaces.inputs import INPUT, shown_size
from spaces.methods.base import Draft, Statistics
from spaces.recipe import Choice, Resize, is_identity
from spaces.sites import Sites


class Resizing:
    """Smaller images at the same weights.

    The network is not touched. A detector's places on the image depend on the size, so `evaluators` take the
    detector of that size, with images, ranges and a teacher of its own, from there on.
    """

    kind = "resize"

    def options(self, sites: Sites, capabilities: Capabilities) -> dict[str, tuple[Choice, ...]]:
        """The study's own size, then smaller ones."""
        if sites.input is None:
            return {}
        smaller = (Resize(height=height, width=width) for height, width in sites.input.smaller)
        return {INPUT: (Resize(), *smaller)}

    def check(self, choice: Choice, sites: Sites) -> None:
        """Raises InputError for another site than the input, and for a size that is not on offer."""
        assert isinstance(choice, Resize)
        if choice.site != INPUT:
            raise InputError("recipe.resize.site", choice.site, f"must be {INPUT}")
        offered = [] if sites.input is None else [*sites.input.smaller]
        if choice.size not in offered and not is_identity(choice):
            remedy = (
                f"choose one of {', '.join(map(shown_size, offered))}" if offered else "no size is on offer"
            )
            raise InputError("recipe.resize", shown_size(choice.size), remedy)

    def apply(self, draft: Draft, choices: Sequence[Choice], sites: Sites, statistics: Statistics) -> None:
        """Note the size."""
        for choice in choices:
            assert isinstance(choice, Resize)
            draft.size = None if is_identity(choice) else choice.size
