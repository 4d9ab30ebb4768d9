"""Quantisation: the bit-width at which a layer is stored and run."""

from __future__ import annotations

from collections.abc import Sequence

from spaces.capabilities import Capabilities
from spaces.errors import InputError
from spaces.methods.base import Draft, Statistics
from spaces.recipe import Choice, Quantize
from spaces.sites import Sites


class Quantization:
    """One bit-width per layer site, for weights and activations alike; those that the target runs natively.

    The network itself stays as it is: ranges need data, and the engine's own arithmetic counts, so
    `evaluators` calibrates and writes the bit-widths into the exported file.
    """

    kind = "quantize"

    def options(self, sites: Sites, capabilities: Capabilities) -> dict[str, tuple[Choice, ...]]:
        """The target's bit-widths, widest first."""
        return {
            name: tuple(
                Quantize(site=name, weight_bits=b, activation_bits=b) for b in capabilities.bit_widths
            )
            for name in sites.layer
        }

    def check(self, choice: Choice, sites: Sites) -> None:
        """Raises InputError for a site that is no layer site."""
        if choice.site not in sites.layer:
            raise InputError("recipe.quantize.site", choice.site, "is no layer site of this detector")

    def apply(self, draft: Draft, choices: Sequence[Choice], sites: Sites, statistics: Statistics) -> None:
        """Note the bit-widths of the layers of each site."""
        for choice in choices:
            assert isinstance(choice, Quantize)
            for layer in sites.layer[choice.site].layers:
                draft.bits[layer] = (choice.weight_bits, choice.activation_bits)
