"""Recipes gathered from studies that really evaluated them, and added to those of earlier ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from search.benchmarks.recorded import Recorded, decoded, gathered
from search.sensitivity import JOB, single_changes
from search.study import FINGERPRINT, SearchStudy
from search.trials import JOB_PREFIX
from spaces.capabilities import Capabilities
from spaces.errors import InputError
from tests.search.test_expected_loss import Lucky, stored


def bench_of(lucky: Lucky) -> Any:
    """What `gathered` asks of a bench."""
    space = lucky.made_up.table.space
    config = SimpleNamespace(
        model="toy", space=SimpleNamespace(methods=("prune", "quantize"), granularity="block")
    )
    return SimpleNamespace(
        space=space,
        config=config,
        categories=["a"],
        detector=SimpleNamespace(preprocess=SimpleNamespace(size=(16, 16))),
        capabilities=Capabilities((32, 16, 8), channel_granule=8),
    )


def study_of(folder: Path, lucky: Lucky) -> SearchStudy:
    """A study that measured the damage of every single option as 1."""
    folder.mkdir()
    study = stored(folder, lucky)
    study.optuna.set_user_attr(FINGERPRINT, {"detector": "toy", "seed": 0})
    damage = {recipe.key: 1.0 for _, _, recipe in single_changes(lucky.made_up.table.space)}
    study.optuna.set_user_attr(f"{JOB_PREFIX}{JOB} 1/1", {"result": {"damage": damage}})
    return study


def figures(recorded: Recorded) -> dict[str, tuple[float, float]]:
    return dict(zip(recorded.recipes, zip(recorded.map, recorded.ratio, strict=True), strict=True))


def test_recipes_of_studies_are_gathered_once_and_added_to_earlier_ones(tmp_path: Path) -> None:
    lucky, other = Lucky(0), Lucky(1)
    other.made_up = lucky.made_up  # of the same space
    bench = bench_of(lucky)
    first, second = study_of(tmp_path / "a", lucky), study_of(tmp_path / "b", other)
    one, both = gathered(bench, [first]), gathered(bench, [first, second])
    assert len(one.recipes) == len(lucky.options)
    np.testing.assert_array_equal(decoded(one.recipes), lucky.options)
    np.testing.assert_allclose(one.map, 60.0 + lucky.measured, atol=1e-3)
    assert one.base_map == 60.0
    distinct = len(np.unique(np.concatenate([lucky.options, other.options]), axis=0))
    assert len(both.recipes) == distinct > len(one.recipes)
    assert figures(one).items() <= figures(both).items(), "the first that evaluated a recipe counts"
    added = gathered(bench, [second], earlier=one)
    assert figures(added) == figures(both)
    assert set(added.source) == {first.name, second.name}


def test_earlier_recipes_of_another_problem_are_refused(tmp_path: Path) -> None:
    lucky = Lucky(0)
    study = study_of(tmp_path / "a", lucky)
    one = gathered(bench_of(lucky), [study])
    study.optuna.set_user_attr(FINGERPRINT, {"detector": "toy", "seed": 1})
    with pytest.raises(InputError, match=r"differs from .* in seed"):
        gathered(bench_of(lucky), [study], earlier=one)
    study.optuna.set_user_attr(FINGERPRINT, {"detector": "toy", "seed": 0})
    study.optuna.set_user_attr(f"{JOB_PREFIX}{JOB} 1/1", {})
    with pytest.raises(InputError, match="none of the studies has a base and sensitivities"):
        gathered(bench_of(lucky), [study])
