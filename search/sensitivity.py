"""Sensitivity: the damage of every option of every parameter, one at a time, without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluators.jobs import Job
from spaces.recipe import Recipe
from spaces.space import SearchSpace
from spaces.table import SpaceTable

JOB = "sensitivity"
LEVELS = 3
"""Measured options of a parameter beside the first; those between are interpolated."""


def single_changes(space: SearchSpace) -> list[tuple[int, int, Recipe]]:
    """The recipes to measure, as (parameter, option, recipe): each changes one parameter alone."""
    changes = []
    for p, (name, parameter) in enumerate(space.parameters.items()):
        last = len(parameter.values) - 1
        picked = sorted({round(k) for k in np.linspace(1, last, min(LEVELS, last))})
        for option in picked:
            changes.append((p, option, space.recipe({name: parameter.values[option]})))
    return changes


def sensitivity_jobs(space: SearchSpace, chunks: int) -> list[Job]:
    """The measurements in `chunks` jobs of about equal length."""
    texts = [recipe.to_json() for _, _, recipe in single_changes(space)]
    parts = [texts[k::chunks] for k in range(chunks)]
    return [
        Job(kind="damage", name=f"{JOB} {k + 1}/{chunks}", payload={"recipes": part})
        for k, part in enumerate(parts)
        if part
    ]


def damage_table(table: SpaceTable, results: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """Damage `(P, O)` of every option, from the results of `sensitivity_jobs`.

    Column 0 is 0; options that were not measured are interpolated by the value they set, damage never
    falling with stronger compression; infinite where a parameter has no such option or nothing is known.
    """
    known: dict[str, float] = {}
    for result in results:
        known |= result["damage"]
    most = int(table.sizes.max(initial=1))
    damage = np.full((len(table.names), most), np.inf)
    damage[:, 0] = 0.0
    measured: dict[int, list[tuple[int, float]]] = {}
    for p, option, recipe in single_changes(table.space):
        value = known.get(recipe.key)
        if value is not None and np.isfinite(value):
            measured.setdefault(p, []).append((option, max(value, 0.0)))
    for p, pairs in measured.items():
        options = np.array([0] + [o for o, _ in pairs])
        values = np.maximum.accumulate([0.0] + [v for _, v in pairs])
        every = np.arange(options[-1] + 1)
        damage[p, every] = np.interp(every, options, values)
    return damage
