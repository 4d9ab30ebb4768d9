"""The search space: sites times options, as Optuna parameters and back."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from spaces.capabilities import Capabilities
from spaces.detectors.base import Detector
from spaces.effects import total_macs
from spaces.errors import InputError
from spaces.inputs import shown_size
from spaces.methods.registry import METHODS
from spaces.recipe import (
    BITS,
    Activate,
    Choice,
    Codebook,
    Drop,
    Factorize,
    Gate,
    Proposals,
    Prune,
    Quantize,
    Recipe,
    Resize,
    TopK,
    is_identity,
)
from spaces.sites import Sites

Granularity = Literal["layer", "block", "stage"]
MAX_PARAMETERS = 120
LABELS = {
    "prune": "sparsity",
    "quantize": "bits",
    "factorize": "rank",
    "activate": "activation",
    "drop": "block",
    "codebook": "codebook",
    "resize": "size",
    "proposals": "proposals",
    "topk": "top-k",
    "gate": "gate",
}
JOINED = ("prune", "quantize", "factorize", "codebook")
"""Kinds that `granularity` joins; sites of the others are blocks, stages or the input as they are."""

CPU = Capabilities(bit_widths=(32, 16, 8))

Value = float | str
"""A parameter's value as Optuna and its dashboard see it."""


@dataclass(frozen=True)
class Parameter:
    """One Optuna parameter: a value that is chosen once for all its sites.

    Attributes:
        name: what the dashboard shows, such as `sparsity backbone.C3_p3.conv1`.
        kind: the kind of choice.
        values: sparsities, bit-widths, rank ratios, shares or names; the first one changes nothing.
        choices: for each value, the choice at each site.
    """

    name: str
    kind: str
    values: tuple[Value, ...]
    choices: tuple[tuple[Choice, ...], ...]

    @property
    def distribution(self) -> BaseDistribution:
        """An ordered one where the values are even steps, so that samplers know what lies between."""
        if self.kind == "prune" and len(self.values) > 1:
            numbers = [float(value) for value in self.values]
            step = numbers[1]
            even = all(abs(value - k * step) < 1e-9 for k, value in enumerate(numbers))
            if even:
                return FloatDistribution(0.0, numbers[-1], step=step)
        return CategoricalDistribution(self.values)

    def option(self, value: Value) -> int:
        """Position of a value. Raises InputError if it is none of the parameter's."""
        try:
            return position_in(self.values, value)
        except ValueError:
            shown = ", ".join(v if isinstance(v, str) else f"{v:g}" for v in self.values)
            raise InputError(self.name, value, f"choose one of {shown}") from None


def position_in(values: Sequence[Value], value: Value) -> int:
    """Where a value stands; numbers may be off by rounding, as those that samplers compute are.

    Raises:
        ValueError: it is none of them.
    """
    for position, known in enumerate(values):
        if isinstance(known, str) or isinstance(value, str):
            if known == value:
                return position
        elif abs(known - value) < 1e-4:
            return position
    raise ValueError(f"{value} is none of {values}")


class SearchSpace:
    """What may be chosen for one detector on one target.

    Args:
        detector: its name, for the recipes.
        sites: on the base graph.
        parameters: at most one choice a kind and site.
        ranks_left_out: sites whose rank is not searched, because there would be too many parameters.
        capabilities: of the target, which say at which width the others run.
    """

    def __init__(
        self,
        detector: str,
        sites: Sites,
        parameters: Sequence[Parameter],
        ranks_left_out: int = 0,
        capabilities: Capabilities = CPU,
    ) -> None:
        self.detector, self.sites, self.ranks_left_out = detector, sites, ranks_left_out
        self.capabilities = capabilities
        self.parameters = {p.name: p for p in parameters if len(p.values) > 1}

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's view, by parameter name."""
        return {name: parameter.distribution for name, parameter in self.parameters.items()}

    def identity_params(self) -> dict[str, Value]:
        """The parameters of the base model."""
        return {name: parameter.values[0] for name, parameter in self.parameters.items()}

    def recipe(self, params: Mapping[str, Any]) -> Recipe:
        """The recipe of one value for every parameter; a missing one stays at its first value.

        Raises:
            InputError: an unknown parameter or value.
        """
        choices: list[Choice] = []
        for name, value in params.items():
            if name not in self.parameters:
                raise InputError("parameter", name, "is none of this space")
            parameter = self.parameters[name]
            choices += parameter.choices[parameter.option(value)]
        return Recipe(detector=self.detector, choices=tuple(choices))

    def params(self, recipe: Recipe) -> dict[str, Value]:
        """The parameters that make a recipe; the inverse of `recipe`.

        Raises:
            InputError: no parameters of this space make it.
        """
        if recipe.detector != self.detector:
            raise InputError("recipe.detector", recipe.detector, f"the space is of {self.detector}")
        wanted = {(choice.kind, choice.site): choice for choice in recipe.choices}
        result = {}
        for name, parameter in self.parameters.items():
            here = {(c.kind, c.site) for choices in parameter.choices for c in choices}
            mine = {wanted.pop(place) for place in here if place in wanted}
            for value, choices in zip(parameter.values, parameter.choices, strict=True):
                if {c for c in choices if not is_identity(c)} == mine:
                    result[name] = value
                    break
            else:
                raise InputError("recipe", name, "holds choices that the space does not offer together")
        if wanted:
            kind, site = next(iter(wanted))
            raise InputError(f"recipe.{kind}.site", site, "is no site of this space")
        return result

    def contains(self, recipe: Recipe) -> bool:
        """True where some parameters make the recipe."""
        try:
            self.params(recipe)
        except InputError:
            return False
        return True

    def summary(self) -> dict[str, Any]:
        """What makes this space this one and no other, for the study's fingerprint."""
        kinds: dict[str, int] = defaultdict(int)
        for parameter in self.parameters.values():
            kinds[LABELS[parameter.kind]] += 1
        options = sum(len(p.values) for p in self.parameters.values())
        left_out = {"ranks left out": self.ranks_left_out} if self.ranks_left_out else {}
        return {"parameters": len(self.parameters), "options": options, **kinds, **left_out}


def build_space(
    detector: Detector,
    sites: Sites,
    capabilities: Capabilities,
    methods: Sequence[str] = ("prune", "quantize"),
    granularity: Granularity = "layer",
    bit_widths: Sequence[int] = (),
) -> SearchSpace:
    """The space of the given methods; `block` and `stage` choose once for all sites of a block or stage.

    Args:
        detector: it says which block and stage a layer is of.
        sites: of its base.
        capabilities: of the target.
        methods: kinds of choices.
        granularity: how many sites share a choice.
        bit_widths: on offer; the target's native ones where there are none.

    Raises:
        InputError: an unknown method, bit-widths that the target cannot serve, or methods that exclude each
            other.
    """
    capabilities = replace(capabilities, asked=_asked(bit_widths, capabilities))
    if {"quantize", "codebook"} <= set(methods) and min(capabilities.offered) <= 8:
        reason = "a layer takes 8 bits or less, or a codebook: leave one out, or ask for bit_widths [32, 16]"
        raise InputError("space.methods", ", ".join(methods), reason)
    parameters: list[Parameter] = []
    for kind in methods:
        if kind not in METHODS:
            raise InputError("space.methods", kind, f"choose from {', '.join(METHODS)}")
        options = METHODS[kind].options(sites, capabilities)
        fine = granularity if kind in JOINED else "layer"
        for name, members in _joined(detector, sites, options, fine).items():
            parameters.append(_parameter(name, kind, members, sites))
    parameters = [p for p in parameters if len(p.values) > 1]
    offered = _within_limit(detector.name, sites, parameters)
    return SearchSpace(detector.name, sites, offered, len(parameters) - len(offered), capabilities)


def _asked(bit_widths: Sequence[int], capabilities: Capabilities) -> tuple[int, ...]:
    """Bit-widths widest first, 32 among them."""
    unknown = [bits for bits in bit_widths if bits not in BITS]
    if unknown:
        raise InputError("space.bit_widths", unknown[0], f"choose from {', '.join(map(str, BITS))}")
    if bit_widths and min(bit_widths) <= 8 < min(capabilities.bit_widths):
        native = ", ".join(map(str, capabilities.bit_widths))
        raise InputError(
            "space.bit_widths", min(bit_widths), f"no integers here: the target runs {native} bits"
        )
    return tuple(sorted({32, *bit_widths}, reverse=True)) if bit_widths else ()


def _within_limit(detector: str, sites: Sites, parameters: list[Parameter]) -> list[Parameter]:
    """Without the ranks that save least, where there are more than `MAX_PARAMETERS` parameters."""
    ranks = [p for p in parameters if p.kind == "factorize"]
    excess = len(parameters) - MAX_PARAMETERS
    if excess <= 0 or not ranks:
        return parameters

    def macs(parameter: Parameter) -> int:
        return total_macs(Recipe(detector=detector, choices=parameter.choices[-1]), sites)

    dropped = sorted(ranks, key=macs, reverse=True)[:excess]
    return [p for p in parameters if p not in dropped]


def _joined(
    detector: Detector, sites: Sites, options: Mapping[str, tuple[Choice, ...]], granularity: Granularity
) -> dict[str, list[tuple[Choice, ...]]]:
    group: Callable[[str], str] = {"block": detector.block_of, "stage": detector.stage_of}.get(
        granularity, lambda layer: layer
    )
    joined: dict[str, list[tuple[Choice, ...]]] = defaultdict(list)
    for site, choices in options.items():
        joined[site if granularity == "layer" else group(_first_layer(sites, site))].append(choices)
    return joined


def _first_layer(sites: Sites, site: str) -> str:
    if site in sites.layer:
        return sites.layer[site].layers[-1]
    produced = [m.layer for m in sites.channel[site].members if m.side == "out" and m.layer in sites.facts]
    return min(produced, key=list(sites.facts).index)


def _parameter(name: str, kind: str, members: list[tuple[Choice, ...]], sites: Sites) -> Parameter:
    label = f"{LABELS[kind]} {name}"
    if kind not in ("prune", "factorize") or len(members) == 1:
        values = tuple(_value(choice, sites) for choice in members[0])
        return Parameter(label, kind, values, tuple(zip(*members, strict=True)))
    # Sites of several widths share one value: each takes its own nearest step to a sparsity of a multiple of
    # an eighth, and of the ranks that it offers the lowest one that is no lower.
    steps: list[float] = [k / 8 for k in range(8)]
    if kind == "factorize":
        steps = sorted({c.rank_ratio for o in members for c in o if isinstance(c, Factorize)}, reverse=True)
    choices = tuple(
        tuple(_nearest(options, step) for options in members if len(options) > 1) for step in steps
    )
    distinct = [k for k in range(len(steps)) if k == 0 or choices[k] != choices[k - 1]]
    return Parameter(label, kind, tuple(steps[k] for k in distinct), tuple(choices[k] for k in distinct))


def _nearest(options: tuple[Choice, ...], value: float) -> Choice:
    def distance(choice: Choice) -> float:
        match choice:
            case Prune():
                return abs(choice.sparsity - value)
            case Factorize() if choice.rank_ratio >= value:
                return choice.rank_ratio - value
            case _:
                return math.inf

    return min(options, key=distance)


def _value(choice: Choice, sites: Sites) -> Value:
    match choice:
        case Prune():
            return choice.sparsity
        case Quantize():
            return float(choice.weight_bits)
        case Factorize():
            return choice.rank_ratio
        case Activate():
            own = sites.activation[choice.site].function
            return own if choice.function == "own" else choice.function
        case Drop():
            return "dropped" if choice.dropped else "kept"
        case Gate():
            return "constant" if choice.constant else "computed"
        case Codebook():
            return float(choice.entries)
        case Resize():
            assert sites.input is not None
            return shown_size(sites.input.size if is_identity(choice) else choice.size)
        case Proposals():
            return choice.share
        case TopK():
            assert sites.suppression is not None
            return float(choice.count or sites.suppression.limit)
