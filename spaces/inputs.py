"""The input of a network as a site: the smaller sizes at which the same weights run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from spaces.detectors.base import Detector
from spaces.layers import LayerFacts, trace_layers

Size = tuple[int, int]
"""Height and width, pixels."""

INPUT = "input"
STEP = 32
"""Of what sizes are multiples: the coarsest stride of common detectors."""
EIGHTHS = (7, 6, 5, 4)
"""Shares of both sides that are on offer. At less than half of them small objects are gone."""
ONE_SIDE = (15 / 16, 7 / 8, 3 / 4)
"""Shares of one side alone: where images are wider than they are high, or the other way round, much of it is
padding."""
BENT = 0.125
"""How far height over width may leave its own value where both sides shrink."""


@dataclass(frozen=True)
class InputSite:
    """Where the size of the input is chosen, once for the whole recipe.

    Attributes:
        size: the detector's own.
        smaller: by size, the largest first, the facts of the layers in order of execution. Only their
            positions and what they read and write differ from the base's.
    """

    size: Size
    smaller: Mapping[Size, Mapping[str, LayerFacts]]


def shown_size(size: Size) -> str:
    """Such as `320x416`, height first."""
    return "x".join(map(str, size))


def smaller_sizes(size: Size) -> tuple[Size, ...]:
    """Multiples of `STEP` near shares of both sides or of one, the largest area first."""
    height, width = size
    both = ((_near(height * eighths / 8), _near(width * eighths / 8)) for eighths in EIGHTHS)
    found = {(h, w) for h, w in both if h and w and abs(h * width / (w * height) - 1) <= BENT}
    found |= {(_near(height * share), width) for share in ONE_SIDE if width % STEP == 0}
    found |= {(height, _near(width * share)) for share in ONE_SIDE if height % STEP == 0}
    smaller = [(h, w) for h, w in found if 0 < h <= height and 0 < w <= width and (h, w) != size]
    return tuple(sorted(smaller, key=lambda sides: (-sides[0] * sides[1], sides)))


def _near(side: float) -> int:
    return int(side / STEP + 0.5) * STEP


def input_site(
    size: Size, base: Mapping[str, LayerFacts], network: nn.Module, resized: Callable[[Size], Detector]
) -> InputSite | None:
    """The sizes at which a base runs with its weights as they are; None where there is no smaller one.

    A size that the family refuses, or whose network has other layers or weights, is left out.

    Args:
        size: the detector's own.
        base: facts of its layers at that size.
        network: the base.
        resized: makes the same detector for another size.
    """
    found: dict[Size, Mapping[str, LayerFacts]] = {}
    for smaller in smaller_sizes(size):
        try:
            other = resized(smaller)
            copy = other.build()
            copy.load_state_dict(network.state_dict())
            facts = trace_layers(copy, smaller)
        except Exception:  # whatever the user's code raises at a size that it was not made for
            continue
        if other.preprocess.size == smaller and _layers_of(facts) == _layers_of(base):
            found[smaller] = facts
    return InputSite(size, found) if found else None


def load_resized(resized: nn.Module, base: nn.Module, fresh: nn.Module) -> None:
    """Load what a base has learned into a network that was built for another size of the input.

    A buffer that the base has as it was built may depend on the size: it stays as `resized` was built.

    Args:
        resized: changed in place.
        base: trained.
        fresh: built for the size of the base.

    Raises:
        RuntimeError: `resized` has other weights.
    """
    state, built, own = (network.state_dict() for network in (base, fresh, resized))
    buffers = own.keys() & {name for name, _ in base.named_buffers()}
    state |= {name: own[name] for name in buffers & state.keys() if torch.equal(state[name], built[name])}
    resized.load_state_dict(state)


def _layers_of(facts: Mapping[str, LayerFacts]) -> list[tuple[object, ...]]:
    """What must not depend on the size."""
    return [(f.name, f.inputs, f.outputs, f.kernel, f.groups) for f in facts.values()]
