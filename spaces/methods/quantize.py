"""Quantisation: the bit-width at which a layer is stored and run."""

from __future__ import annotations

from collections.abc import Sequence

from spaces.capabilities import Capabilities
from spaces.errors import InputError
from spaces.methods.base import Draft, Statistics
from spaces.recipe import Choice, Quantize
from spaces.sites import Sites


class Quantization:
    """One bit-width per layer site: those that the target runs natively, or those that the space asks for.

    Weights of a width without a kernel are stored at that width and run at the next native one: that buys
    size on disk, never latency. Their activations take the width that the layer runs at, for narrower ones
    would buy nothing at all; a recipe may still ask for them.

    The network itself stays as it is: ranges need data, and the engine's own arithmetic counts, so
    `evaluators` calibrates and writes the bit-widths into the exported file.
    """

    kind = "quantize"

    def options(self, sites: Sites, capabilities: Capabilities) -> dict[str, tuple[Choice, ...]]:
        """The bit-widths on offer, widest first."""
        widths = [(bits, capabilities.runs_at(bits)) for bits in capabilities.offered]
        return {
            name: tuple(
                Quantize(site=name, weight_bits=bits, activation_bits=bits if bits >= 16 else runs)
                for bits, runs in widths
            )
            for name in sites.layer
        }

    def check(self, choice: Choice, sites: Sites) -> None:
        """Raises InputError for a site that is no layer site, and for integers on one side alone."""
        assert isinstance(choice, Quantize)
        if choice.site not in sites.layer:
            raise InputError("recipe.quantize.site", choice.site, "is no layer site of this detector")
        if (choice.weight_bits <= 8) != (choice.activation_bits <= 8):
            both = f"{choice.weight_bits} and {choice.activation_bits}"
            reason = "weights and activations must both have 8 bits or less, or both more"
            raise InputError(f"recipe.quantize.{choice.site}", both, reason)

    def apply(self, draft: Draft, choices: Sequence[Choice], sites: Sites, statistics: Statistics) -> None:
        """Note the bit-widths of the layers of each site."""
        for choice in choices:
            assert isinstance(choice, Quantize)
            for layer in sites.layer[choice.site].layers:
                draft.bits[layer] = (choice.weight_bits, choice.activation_bits)
