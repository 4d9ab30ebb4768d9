"""Which layers do not run in the bit-width that the recipe asks for, by the engine's own profile."""

from __future__ import annotations

from collections.abc import Mapping


def kernel_of(width: int) -> str:
    """The kernel that runs a bit-width on a CPU: `f32`, `bf16` or `i8`; narrower ones run as int8."""
    if width > 16:
        return "f32"
    return "bf16" if width > 8 else "i8"


def fell_back(bits: Mapping[str, int], kernels: Mapping[str, str]) -> dict[str, str]:
    """Layers that run in another type than asked for, with both, such as `f32 instead of i8`.

    Narrower than asked for counts as well: a float32 layer that silently runs in bfloat16 flatters the
    base. A layer that is not in the profile was removed or merged with another one; see `unseen`.

    Args:
        bits: asked for, by layer; what is narrower than the engine's narrowest runs in that one.
        kernels: of `Session.kernels`.
    """
    return {
        layer: f"{kernels[layer]} instead of {kernel_of(width)}"
        for layer, width in bits.items()
        if layer in kernels and kernels[layer] != kernel_of(width)
    }


def unseen(bits: Mapping[str, int], kernels: Mapping[str, str]) -> list[str]:
    """Layers of which the profile says nothing."""
    return [layer for layer in bits if layer not in kernels]
