"""Sensitivity: the damage of every option of every parameter, one at a time, without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluators.jobs import Job
from search.study import SearchStudy
from spaces.recipe import Recipe, told_by_ap
from spaces.space import SearchSpace, Value, position_in
from spaces.table import Options, SpaceTable

JOB = "sensitivity"
CHUNKS = 8
"""Jobs that the measurements are shared out to."""
LEVELS = 3
"""Measured options of a parameter beside the first; those between are interpolated."""
UNORDERED = ("resize",)
"""Kinds whose options are all measured and may cost less than the ones before: which side of an input shrinks
counts for more than its area."""
STORED = "sensitivity"
"""Study attribute: `Sensitivity.to_json`, so that pictures and other studies need no detector to read it."""


@dataclass(frozen=True)
class Sensitivity:
    """What is known of a space's options, as plain data.

    Attributes:
        names: P parameters.
        values: of each parameter; the first one changes nothing.
        damage: `(P, O)`, 0 in column 0, infinite where there is no such option or nothing is known.
    """

    names: list[str]
    values: tuple[tuple[Value, ...], ...]
    damage: NDArray[np.float64]

    def options(self, params: Sequence[Mapping[str, Any]]) -> Options:
        """Positions `(N, P)` of the values of N sets of parameters. Raises ValueError for another value."""
        rows = [
            [position_in(own, one[name]) for name, own in zip(self.names, self.values, strict=True)]
            for one in params
        ]
        return np.array(rows, np.int64).reshape(len(params), len(self.names))

    def to_json(self) -> dict[str, Any]:
        """By parameter: values, and damage with None where it is infinite."""
        return {
            name: {
                "values": list(own),
                "damage": [float(f"{d:.6g}") if np.isfinite(d) else None for d in row[: len(own)]],
            }
            for name, own, row in zip(self.names, self.values, self.damage, strict=True)
        }

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Sensitivity:
        """The inverse of `to_json`."""
        values = tuple(tuple(one["values"]) for one in content.values())
        damage = np.full((len(values), max(map(len, values), default=1)), np.inf)
        for row, one in zip(damage, content.values(), strict=True):
            row[: len(one["damage"])] = [np.inf if d is None else d for d in one["damage"]]
        return Sensitivity(list(content), values, damage)


def sensitivity_of(table: SpaceTable, damage: NDArray[np.float64]) -> Sensitivity:
    """The damage `(P, O)` of a space's options with their names and values."""
    return Sensitivity(table.names, tuple(p.values for p in table.space.parameters.values()), damage)


def store_sensitivity(study: SearchStudy, sensitivity: Sensitivity) -> None:
    """Keep it in the study, unless it is there."""
    content = sensitivity.to_json()
    if study.optuna.user_attrs.get(STORED) != content:
        study.optuna.set_user_attr(STORED, content)


def stored_sensitivity(study: SearchStudy) -> Sensitivity | None:
    """What `store_sensitivity` kept; None where it has not been measured."""
    content = study.optuna.user_attrs.get(STORED)
    return Sensitivity.from_json(content) if content else None


def single_changes(space: SearchSpace) -> list[tuple[int, int, Recipe]]:
    """The recipes to measure, as (parameter, option, recipe): each changes one parameter alone."""
    changes = []
    for p, (name, parameter) in enumerate(space.parameters.items()):
        last = len(parameter.values) - 1
        count = last if parameter.kind in UNORDERED else min(LEVELS, last)
        picked = sorted({round(k) for k in np.linspace(1, last, count)})
        for option in picked:
            changes.append((p, option, space.recipe({name: parameter.values[option]})))
    return changes


def sensitivity_jobs(space: SearchSpace, chunks: int) -> list[Job]:
    """The measurements in `chunks` jobs of about equal length, and one of all that the AP tells.

    Those share the most of what they cost: the base with noise on its weights, scored.
    """
    changes = [(r.to_json(), any(map(told_by_ap, r.choices))) for _, _, r in single_changes(space)]
    texts = [text for text, by_ap in changes if not by_ap]
    parts = [[text for text, by_ap in changes if by_ap], *(texts[k::chunks] for k in range(chunks))]
    return [
        Job(kind="damage", name=f"{JOB} {f'{k}/{chunks}' if k else 'by AP'}", payload={"recipes": part})
        for k, part in enumerate(parts)
        if part
    ]


def damage_table(table: SpaceTable, results: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """Damage `(P, O)` of every option, from the results of `sensitivity_jobs`.

    Column 0 is 0; options that were not measured are interpolated by the value they set, damage never
    falling with stronger compression, but for `UNORDERED` kinds; infinite where a parameter has no such
    option or nothing is known.
    """
    known: dict[str, float] = {}
    for result in results:
        known |= result["damage"]
    most = int(table.sizes.max(initial=1))
    damage = np.full((len(table.names), most), np.inf)
    damage[:, 0] = 0.0
    kinds = [parameter.kind for parameter in table.space.parameters.values()]
    measured: dict[int, list[tuple[int, float]]] = {}
    for p, option, recipe in single_changes(table.space):
        value = known.get(recipe.key)
        if value is not None and np.isfinite(value):
            measured.setdefault(p, []).append((option, max(value, 0.0)))
    for p, pairs in measured.items():
        options = np.array([0] + [o for o, _ in pairs])
        values = np.array([0.0] + [v for _, v in pairs])
        if kinds[p] not in UNORDERED:
            values = np.maximum.accumulate(values)
        every = np.arange(options[-1] + 1)
        damage[p, every] = np.interp(every, options, values)
    return damage
