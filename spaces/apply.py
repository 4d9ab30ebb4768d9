"""Carry out a recipe on a base network, and rebuild the result from what was stored."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spaces.detectors.weights import load_weights, save_weights
from spaces.errors import InputError
from spaces.gates import replace_gates
from spaces.lowrank import Factored
from spaces.methods.activate import replace_activations
from spaces.methods.base import Draft, Statistics
from spaces.methods.drop import drop_blocks
from spaces.methods.factorize import replace_layers
from spaces.methods.proposals import set_proposals
from spaces.methods.registry import METHODS
from spaces.recipe import Codebook, Quantize, Recipe
from spaces.sites import Sites
from spaces.slicing import LayerChannels, slice_layers

PLAN_FILE, STATE_FILE = "recipe.json", "state.safetensors"


def check(recipe: Recipe, sites: Sites) -> None:
    """Refuse a recipe that cannot be carried out.

    Raises:
        InputError: in one line, which choice and why.
    """
    for choice in recipe.choices:
        method = METHODS.get(choice.kind)
        if method is None:
            raise InputError("recipe.kind", choice.kind, f"choose one of {', '.join(METHODS)}")
        method.check(choice, sites)
    for site in recipe.of_kind(Codebook):
        bits = recipe.of_kind(Quantize).get(site)
        if bits is not None and bits.weight_bits <= 8:
            reason = f"has a codebook and weights of {bits.weight_bits} bits; choose one of them"
            raise InputError("recipe.codebook.site", site, reason)


def apply(network: nn.Module, recipe: Recipe, sites: Sites, statistics: Statistics | None = None) -> Draft:
    """A compressed copy of `network`; the base is left untouched.

    Args:
        network: the base, with trained weights; of a recipe that resizes the input, built for that size.
        recipe: what to do.
        sites: of this base, from `spaces.sites.find_sites`.
        statistics: importance of output channels by layer; magnitude of the weights where absent.

    Raises:
        InputError: the recipe does not fit the sites.
    """
    check(recipe, sites)
    draft = Draft(copy.deepcopy(network))
    for kind, method in METHODS.items():
        choices = [choice for choice in recipe.choices if choice.kind == kind]
        if choices:
            method.apply(draft, choices, sites, statistics or {})
    return draft


def save(draft: Draft, recipe: Recipe, directory: Path) -> None:
    """Store what `rebuild` needs: the plan (recipe, kept indices and the like) and the weights."""
    plan = {
        "recipe": recipe.model_dump(mode="json"),
        "channels": {name: {"out": c.out, "into": c.into} for name, c in draft.channels.items()},
        "factors": {name: [plan.kind, *plan.ranks] for name, plan in draft.factors.items()},
        "activations": draft.activations,
        "dropped": draft.dropped,
        "bits": draft.bits,
        "codebooks": draft.codebooks,
        "size": draft.size,
        "proposals": draft.proposals,
        "topk": draft.topk,
        "gates": draft.gates,
        "learned": draft.learned,
    }
    save_weights(draft.network, directory / STATE_FILE)
    temporary = directory / (PLAN_FILE + ".tmp")
    temporary.write_text(json.dumps(plan, separators=(",", ":")))
    temporary.replace(directory / PLAN_FILE)


def rebuild(network: nn.Module, directory: Path) -> tuple[Recipe, Draft]:
    """The recipe and the network that `save` stored, bit for bit.

    Args:
        network: a fresh base network of the same detector, from `detector.build()`, for the recipe's size
            of the input; taken over.
        directory: where `save` wrote.

    Raises:
        InputError: files are missing, damaged or belong to another detector.
    """
    file = directory / PLAN_FILE
    try:
        plan = json.loads(file.read_text())
    except (OSError, ValueError) as error:  # no text, or no JSON
        raise InputError("plan", str(file), f"cannot be read ({error})") from None
    try:
        return _rebuilt(network, plan, directory)
    except InputError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        said = str(error).splitlines()[0] if str(error) else ""
        remedy = f"is no plan for this detector ({type(error).__name__}: {said})"
        raise InputError("plan", str(file), remedy) from error


def _rebuilt(network: nn.Module, plan: Any, directory: Path) -> tuple[Recipe, Draft]:
    """What a plan says, done; whatever it raises where the plan is another's."""
    recipe = Recipe.from_json(json.dumps(plan["recipe"]))
    channels = {
        name: LayerChannels(_indices(sides["out"]), _indices(sides["into"]))
        for name, sides in plan["channels"].items()
    }
    slice_layers(network, channels)
    factors = {name: Factored(kind, tuple(ranks)) for name, (kind, *ranks) in plan.get("factors", {}).items()}
    replace_layers(network, factors)
    activations = dict(plan.get("activations", {}))
    replace_activations(network, activations)
    gates = {name: int(count) for name, count in plan.get("gates", {}).items()}
    replace_gates(network, {name: torch.ones(count) for name, count in gates.items()})
    dropped = tuple(plan.get("dropped", ()))
    drop_blocks(network, dropped)
    proposals = {name: int(count) for name, count in plan.get("proposals", {}).items()}
    set_proposals(network, proposals)
    load_weights(network, directory / STATE_FILE)
    bits = {name: (int(weight), int(activation)) for name, (weight, activation) in plan["bits"].items()}
    codebooks = {name: int(entries) for name, entries in plan.get("codebooks", {}).items()}
    size = tuple(plan["size"]) if plan.get("size") else None
    draft = Draft(network, channels, bits, activations, dropped, factors, codebooks, size, proposals)
    draft.topk, draft.gates, draft.learned = plan.get("topk"), gates, plan.get("learned", {})
    return recipe, draft


def _indices(values: list[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)


def parameters(network: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in network.parameters())


def same_state(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """True where two state dictionaries are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
