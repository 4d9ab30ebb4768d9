"""Seeds: the recipes that a study begins with, solved for before anything but single choices is known."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evaluators.latency_model import LatencyModel
from search.solver import at_damages, damage_path
from spaces.table import SpaceTable

BFLOAT16_BITS = 16.0
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
    lie behind it because the models of damage and latency were wrong about it. Likewise the fastest of them
    with a polynomial in all stages, where that gains anything. Of the solutions, the mildest is allowed what
    bfloat16 in all layers does, where the target has it: that is free in practice. The strongest has an
    eighth of the largest damage, beyond which nothing is left. Where nothing costs anything, the fastest is
    the only one. Options of unknown damage are in no solution.

    Args:
        table: of the space.
        damage: `(P, O)` of single options.
        model: of latency, fitted on probes.
        count: of recipes that are solved for, at most.
    """
    starts = uniform_starts(table)
    uniform = [row for row in starts[1:] if narrowest(table, row) >= WHOLE_BITS]
    smooth = [row for row in smooth_starts(table) if narrowest(table, row) >= WHOLE_BITS]
    if smooth:
        ratios = model.predict(np.stack(smooth))
        fastest = smooth[int(ratios.argmin())]
        if ratios.min() < model.predict(own_functions(table, fastest)[None])[0]:
            uniform.append(fastest)
    path = [point for point in damage_path(damage, model, starts) if np.isfinite(point.damage)]
    if not path:
        return uniform
    strongest = path[-1].damage
    low = max(path[0].damage, _bfloat16_damage(table, damage), 1e-3 * strongest)
    wanted = low * np.geomspace(1.0, max(strongest / low / 8, 2.0), count) if low > 0 else np.zeros(1)
    solved = [point.options for point in at_damages(path, wanted)]
    return uniform + [row for row in solved if not any(np.array_equal(row, one) for one in uniform)]


def narrowest(table: SpaceTable, options: NDArray[np.int64]) -> float:
    """The fewest bits that a recipe `(P,)` stores weights in."""
    chosen = zip(table.space.parameters.values(), options, strict=True)
    return min((float(p.values[k]) for p, k in chosen if p.kind == "quantize"), default=32.0)


def _bfloat16_damage(table: SpaceTable, damage: NDArray[np.float64]) -> float:
    """Damage of bfloat16 in all layers of which it is known; 0 where the space does not offer it."""
    total = 0.0
    for p, parameter in enumerate(table.space.parameters.values()):
        if parameter.kind == "quantize" and BFLOAT16_BITS in parameter.values:
            one = float(damage[p, parameter.values.index(BFLOAT16_BITS)])
            total += one if np.isfinite(one) else 0.0
    return total


def smooth_starts(table: SpaceTable) -> list[NDArray[np.int64]]:
    """All layers at each bit-width, with a polynomial in every stage that offers one; empty without such."""
    place = [
        p.values.index("polynomial") if p.kind == "activate" and "polynomial" in p.values else 0
        for p in table.space.parameters.values()
    ]
    return [row + np.array(place, np.int64) for row in uniform_starts(table)] if any(place) else []


def own_functions(table: SpaceTable, options: NDArray[np.int64]) -> NDArray[np.int64]:
    """A recipe `(P,)` with every stage's own activation function."""
    replaced = np.array([p.kind == "activate" for p in table.space.parameters.values()])
    return np.where(replaced, 0, options)


def uniform_starts(table: SpaceTable) -> list[NDArray[np.int64]]:
    """The base, and for each bit-width of the space all layers at it; nothing pruned."""
    bits = np.array([name.startswith("bits ") for name in table.names])
    most = int(table.sizes[bits].max(initial=1))
    return [np.where(bits, np.minimum(k, table.sizes - 1), 0) for k in range(most)]
