"""Cheaper activation functions: ReLU, hard-swish or a polynomial in the place of SiLU and its like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from spaces.activations import COSTLY, PolynomialSiLU
from spaces.capabilities import Capabilities
from spaces.errors import InputError
from spaces.methods.base import Draft, Statistics
from spaces.recipe import Activate, Choice, Function
from spaces.sites import Sites

CHEAPER: Mapping[str, type[nn.Module]] = {
    "polynomial": PolynomialSiLU,
    "hardswish": nn.Hardswish,
    "relu": nn.ReLU,
}
"""From the closest to SiLU to the cheapest."""


class Activation:
    """One activation function per stage; sites are the stages that compute a costly one."""

    kind = "activate"

    def options(self, sites: Sites, capabilities: Capabilities) -> dict[str, tuple[Choice, ...]]:
        """The stage's own function; for SiLU a polynomial, where the target fuses it; hard-swish; ReLU."""

        def offered(own: str) -> list[Function]:
            smooth: list[Function] = (
                ["polynomial"] if own == "silu" and capabilities.fuses_elementwise else []
            )
            hard: list[Function] = [] if own == "hardswish" else ["hardswish"]
            return ["own", *smooth, *hard, "relu"]

        return {
            name: tuple(Activate(site=name, function=function) for function in offered(site.function))
            for name, site in sites.activation.items()
        }

    def check(self, choice: Choice, sites: Sites) -> None:
        """Raises InputError for a stage without costly activations."""
        if choice.site not in sites.activation:
            raise InputError("recipe.activate.site", choice.site, "is no stage with SiLU or the like")

    def apply(self, draft: Draft, choices: Sequence[Choice], sites: Sites, statistics: Statistics) -> None:
        """Replace the modules of each stage."""
        functions = {
            module: choice.function
            for choice in choices
            if isinstance(choice, Activate) and choice.function != "own"
            for module in sites.activation[choice.site].modules
        }
        draft.activations.update(functions)
        replace_activations(draft.network, functions)


def replace_activations(network: nn.Module, functions: Mapping[str, str]) -> None:
    """Put another function, a name of `CHEAPER`, in the place of activation modules, by their names.

    Raises:
        InputError: a name of a function that is not known.
    """
    for name, function in functions.items():
        if function not in CHEAPER:
            raise InputError(f"activations.{name}", function, f"choose from {', '.join(CHEAPER)}")
        old = network.get_submodule(name)
        if COSTLY.get(type(old)) != function:
            network.set_submodule(name, CHEAPER[function](inplace=getattr(old, "inplace", False)))
