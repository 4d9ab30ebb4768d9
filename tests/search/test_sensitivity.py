from __future__ import annotations

import numpy as np
import pytest

from search.sensitivity import Sensitivity, damage_table, sensitivity_jobs, single_changes
from tests.search.toy_space import toy_table


def test_every_parameter_is_measured_at_its_weakest_and_strongest() -> None:
    table = toy_table()
    measured: dict[int, list[int]] = {}
    for p, option, recipe in single_changes(table.space):
        measured.setdefault(p, []).append(option)
        params = table.space.params(recipe)
        changed = [name for name, value in params.items() if value != table.space.parameters[name].values[0]]
        assert changed == [table.names[p]]
    assert sorted(measured) == list(range(len(table.names)))
    for p, options in measured.items():
        assert options[0] == 1
        assert options[-1] == table.sizes[p] - 1


@pytest.mark.parametrize("chunks", [1, 3, 8])
def test_jobs_hold_every_recipe_once(chunks: int) -> None:
    space = toy_table().space
    jobs = sensitivity_jobs(space, chunks)
    texts = [text for job in jobs for text in job.payload["recipes"]]
    assert sorted(texts) == sorted(recipe.to_json() for _, _, recipe in single_changes(space))
    assert len({job.name for job in jobs}) == len(jobs)


def test_table_interpolates_and_never_falls() -> None:
    table = toy_table()
    longest = int(np.argmax(table.sizes))
    found = {}
    for p, option, recipe in single_changes(table.space):
        value = {1: 2.0, int(table.sizes[p]) - 1: 6.0}.get(option, 1.0)  # 1.0: noise, below the weaker one
        found[recipe.key] = value
    damage = damage_table(table, [{"damage": found}])
    size = int(table.sizes[longest])
    row = damage[longest]
    assert row[0] == 0.0
    assert row[1] == 2.0
    assert row[size - 1] == 6.0
    assert (np.diff(row[:size]) >= 0).all()
    assert np.isinf(row[size:]).all()


def test_what_was_not_measured_is_never_proposed() -> None:
    table = toy_table()
    damage = damage_table(table, [])
    assert (damage[:, 0] == 0).all()
    assert np.isinf(damage[:, 1:]).all()


def test_values_that_a_sampler_computed_are_found() -> None:
    """Optuna's steps of 0.2 reach 0.6000000000000001."""
    known = Sensitivity(["a"], ((0.0, 0.2, 0.4, 0.6),), np.zeros((1, 4)))
    assert known.options([{"a": 3 * 0.2}]).tolist() == [[3]]
    with pytest.raises(ValueError, match=r"0.5 is none of"):
        known.options([{"a": 0.5}])
