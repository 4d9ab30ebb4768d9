"""Which layers do not run in the bit-width that the recipe asks for, by the engine's own profile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from evaluators.graph import SCOPE, scope_of

if TYPE_CHECKING:
    from torch import nn


def kernel_of(width: int, native: Sequence[int]) -> str:
    """The kernel that runs a bit-width: `f32`, `bf16`, `i8`, `i4`, ... of the next one that is native."""
    runs = min((one for one in native if one >= width), default=32)
    return {32: "f32", 16: "bf16"}.get(runs, f"i{runs}")


def fell_back(bits: Mapping[str, int], kernels: Mapping[str, str], native: Sequence[int]) -> dict[str, str]:
    """Layers that run in another type than asked for, with both, such as `f32 instead of i8`.

    Narrower than asked for counts as well: a float32 layer that silently runs in bfloat16 flatters the
    base. So does a layer whose weight is not in the file under its name (it is computed anew in every pass,
    say), by the kernel of the node that runs it. Any other layer that is not in the profile was removed or
    merged with another one; see `unseen`.

    Args:
        bits: asked for, by layer.
        kernels: of `Session.kernels`.
        native: bit-widths of the target's capabilities.
    """
    asked = {layer: kernel_of(width, native) for layer, width in bits.items()}
    nameless = {scope_of(name): kind for name, kind in kernels.items() if name.startswith(SCOPE)}
    found = {layer: kernels.get(layer, nameless.get(layer, kind)) for layer, kind in asked.items()}
    return {
        layer: f"{found[layer]} instead of {kind}" for layer, kind in asked.items() if found[layer] != kind
    }


def by_kind(kernels: Mapping[str, str]) -> dict[str, int]:
    """Number of kernels of each type, of what `Session.kernels` says."""
    return dict(sorted(Counter(kernels.values()).items()))


def unseen(bits: Mapping[str, int], kernels: Mapping[str, str]) -> list[str]:
    """Layers of which the profile says nothing."""
    return [layer for layer in bits if layer not in kernels]


def unchosen(bits: Mapping[str, int], kernels: Mapping[str, str], network: nn.Module) -> dict[str, str]:
    """What runs modules of the network that have no bit-width: no recipe says how they are to run."""
    modules = {name for name, _ in network.named_modules(remove_duplicate=False)}
    return {name: kind for name, kind in kernels.items() if name in modules and name not in bits}


def stored_and_run(
    bits: Mapping[str, int], packed: Mapping[str, int], kernels: Mapping[str, str]
) -> dict[str, int]:
    """Number of layers by what a weight takes in the file and what ran it, such as `4 bits, ran as i8`.

    Args:
        bits: chosen, by layer.
        packed: bits of a weight, of the layers that are packed; the others take whole bytes.
        kernels: of `Session.kernels`.
    """
    found: dict[str, int] = {}
    for layer, width in bits.items():
        stored = packed.get(layer, max(width, 8))
        line = f"{stored} bits, ran as {kernels.get(layer, 'unseen')}"
        found[line] = found.get(line, 0) + 1
    return dict(sorted(found.items()))
