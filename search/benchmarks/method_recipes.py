"""One fixed recipe of moderate strength for each method, so that families can be compared."""

from __future__ import annotations

from collections.abc import Callable

from evaluators.bench import Bench
from spaces.methods.registry import METHODS
from spaces.recipe import Activate, AnyChoice, Choice, Codebook, Factorize, Prune, Quantize, Recipe, TopK

SPARSITY, RANK, ENTRIES = 0.25, 0.5, 64
"""Share of the channels that goes at every site, or what it offers nearest to that; rank over the full one;
values in a codebook."""
BOXES = 100
MILD_SPARSITY = 0.125
"""Where pruning comes together with low rank and int8, for losses add up."""


def recipe_of(method: str, bench: Bench) -> Recipe | None:
    """The recipe of a method of `MODERATE`, None where the detector or its engine has nothing for it."""
    choices = MODERATE[method](bench)
    return Recipe(detector=bench.detector.name, choices=tuple(choices)) if choices else None


def together(bench: Bench, sparsity: float, rank: float, bits: int) -> list[AnyChoice]:
    """Pruning, low rank where it pays at the base's shape, and a bit-width, at every site."""
    return [*pruned(bench, sparsity), *_factorised(bench, rank), *_quantised(bench, bits)]


def _options(bench: Bench, kind: str) -> list[tuple[Choice, ...]]:
    """What a method offers at each site, in order of execution; the first option changes nothing."""
    offered = METHODS[kind].options(bench.sites, bench.capabilities)
    return [options for options in offered.values() if len(options) > 1]


def pruned(bench: Bench, sparsity: float) -> list[AnyChoice]:
    """The sparsity on offer nearest to this one, at every site."""

    def distance(choice: Choice) -> float:
        assert isinstance(choice, Prune)
        return abs(choice.sparsity - sparsity)

    return [min(options, key=distance) for options in _options(bench, "prune")]


def _factorised(bench: Bench, rank: float) -> list[AnyChoice]:
    """At each site the lowest rank on offer that is no lower; sites without one stay whole."""
    ranks = [
        [one for one in options[1:] if isinstance(one, Factorize) and one.rank_ratio >= rank]
        for options in _options(bench, "factorize")
    ]
    return [offered[-1] for offered in ranks if offered]


def _quantised(bench: Bench, bits: int) -> list[AnyChoice]:
    if bits not in bench.capabilities.bit_widths:
        return []
    return [Quantize(site=site, weight_bits=bits, activation_bits=bits) for site in bench.sites.layer]


def _clustered(bench: Bench) -> list[AnyChoice]:
    return [Codebook(site=site, entries=ENTRIES) for site in bench.sites.layer]  # type: ignore[arg-type]


def _activated(bench: Bench, function: str) -> list[AnyChoice]:
    """One function in all stages that offer it."""
    offered = (choice for options in _options(bench, "activate") for choice in options)
    return [choice for choice in offered if isinstance(choice, Activate) and choice.function == function]


def _smooth_and_half(bench: Bench) -> list[AnyChoice]:
    smooth, half = _activated(bench, "polynomial"), _quantised(bench, 16)
    return [*smooth, *half] if smooth and half else []


def _dropped(bench: Bench) -> list[AnyChoice]:
    """Every second residual block; the only one where there is one."""
    blocks = [options[-1] for options in _options(bench, "drop")]
    return [*(blocks[1::2] or blocks)]


MODERATE: dict[str, Callable[[Bench], list[AnyChoice]]] = {
    "prune": lambda bench: pruned(bench, SPARSITY),
    "quantize int8": lambda bench: _quantised(bench, 8),
    "quantize bf16": lambda bench: _quantised(bench, 16),
    "codebook": _clustered,
    "factorize": lambda bench: _factorised(bench, RANK),
    "activate": lambda bench: _activated(bench, "relu"),
    "activate polynomial": lambda bench: _activated(bench, "polynomial"),
    "activate polynomial, bf16": _smooth_and_half,
    "drop": _dropped,
    "gate": lambda bench: [options[-1] for options in _options(bench, "gate")],
    "topk": lambda _: [TopK(count=BOXES)],
    "prune + factorize + int8": lambda bench: together(bench, MILD_SPARSITY, RANK, 8),
}
"""Methods by name, in the order of the table. A new method is one line here and one in `MEANING`."""

MEANING: dict[str, str] = {
    "prune": f"{SPARSITY:.0%} of the channels of every site",
    "quantize int8": "weights and activations of every layer at 8 bits",
    "quantize bf16": "every layer in bfloat16",
    "codebook": f"every weight stored as one of {ENTRIES} values of its layer",
    "factorize": f"{RANK:g} of the full rank, or the next above, of every layer that becomes cheaper by it",
    "activate": "ReLU in the place of costlier activations, in all stages",
    "activate polynomial": "SiLU by a polynomial of degree 7, in all stages",
    "activate polynomial, bf16": "the same with every layer in bfloat16",
    "drop": "every second residual block left out",
    "gate": "constant gates in all squeeze-and-excitation blocks",
    "topk": f"no more than {BOXES} boxes go into suppression",
    "prune + factorize + int8": f"{MILD_SPARSITY:.1%} of the channels, ranks as above, all layers at 8 bits",
}
