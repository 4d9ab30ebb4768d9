"""Seeds: the recipes that a study begins with, solved for before anything but single choices is known."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evaluators.latency_model import LatencyModel
from search.solver import at_damages, damage_path
from spaces.table import SpaceTable

WHOLE_BITS = 8.0
"""Fewer would have to be trained."""
SEEDS = 3
"""Solved for: they show what a unit of damage costs on this detector, and with that known the sampler's own
solutions are better ones. Three led to better fronts than one, two or six, on recorded recipes."""


def seed_recipes(
    table: SpaceTable, damage: NDArray[np.float64], model: LatencyModel, count: int = SEEDS
) -> list[NDArray[np.int64]]:
    """Every whole bit-width first, then recipes `(P,)` spaced evenly by the logarithm of their damage.

    All layers at one width is what other tools make of a network, and needs no training: a front should not
    lie behind it because the models of damage and latency were wrong about it. Of the solutions, the mildest
    is allowed what bfloat16 in all layers does, where the target has it: that is free in practice. The
    strongest has an eighth of the largest damage, beyond which nothing is left.

    Args:
        table: of the space.
        damage: `(P, O)` of single options.
        model: of latency, fitted on probes.
        count: of recipes that are solved for, at most.
    """
    starts = uniform_starts(table)
    uniform = [row for row in starts[1:] if narrowest(table, row) >= WHOLE_BITS]
    path = damage_path(damage, model, starts)
    if not path:
        return uniform
    low = max(path[0].damage, _bfloat16_damage(table, damage), 1e-3 * path[-1].damage)
    wanted = low * np.geomspace(1.0, max(path[-1].damage / low / 8, 2.0), count)
    solved = [point.options for point in at_damages(path, wanted)]
    return uniform + [row for row in solved if not any(np.array_equal(row, one) for one in uniform)]


def narrowest(table: SpaceTable, options: NDArray[np.int64]) -> float:
    """The fewest bits that a recipe `(P,)` stores weights in."""
    chosen = zip(table.space.parameters.values(), options, strict=True)
    return min((float(p.values[k]) for p, k in chosen if p.kind == "quantize"), default=32.0)


def _bfloat16_damage(table: SpaceTable, damage: NDArray[np.float64]) -> float:
    """Damage of bfloat16 in all layers; 0 where the space does not offer it."""
    total = 0.0
    for p, parameter in enumerate(table.space.parameters.values()):
        if parameter.kind == "quantize" and 16.0 in parameter.values:
            total += float(damage[p, parameter.values.index(16.0)])
    return total


def uniform_starts(table: SpaceTable) -> list[NDArray[np.int64]]:
    """The base, and for each bit-width of the space all layers at it; nothing pruned."""
    bits = np.array([name.startswith("bits ") for name in table.names])
    most = int(table.sizes[bits].max(initial=1))
    return [np.where(bits, np.minimum(k, table.sizes - 1), 0) for k in range(most)]
