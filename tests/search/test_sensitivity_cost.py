"""What sensitivities cost beside the trials of a study, by hand."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest
from optuna.trial import TrialState, create_trial
from toy_problem import to_recipe, toy_study

from search.benchmarks.sensitivity_cost import cost_of, write_costs
from search.study import SearchStudy
from search.trials import DUPLICATE_OF, JOB_PREFIX, RECIPE
from spaces.errors import InputError
from tests.search.test_rungs import evaluation

BEGAN = datetime(2026, 12, 1, 12, 0, 0)


def add(
    study: SearchStudy, seconds: float, state: TrialState, sparsity: float, duplicate: bool = False
) -> None:
    complete = state == TrialState.COMPLETE
    attributes = {RECIPE: to_recipe({"a": sparsity}).to_json(), **(evaluation(60.0, 1.0) if complete else {})}
    if duplicate:
        attributes[DUPLICATE_OF] = 1
    trial = create_trial(state=state, values=[60.0, 10.0] if complete else None, user_attrs=attributes)
    trial.datetime_start, trial.datetime_complete = BEGAN, BEGAN + timedelta(seconds=seconds)
    study.optuna.add_trial(trial)


def test_shares_by_hand(tmp_path: Path) -> None:
    study = toy_study(tmp_path)
    with pytest.raises(InputError, match="measured no sensitivities"):
        cost_of(study)
    for number, (seconds, key) in enumerate([(50.0, "x"), (70.0, "y")]):
        result = {"damage": {key: 0.5, "z": 0.1}, "seconds": seconds}
        study.optuna.set_user_attr(f"{JOB_PREFIX}sensitivity {number}/2", {"result": result})
    study.optuna.set_user_attr(f"{JOB_PREFIX}probe 1/1", {"result": {"ratio": 0.5}})
    add(study, 500.0, TrialState.COMPLETE, 0.0)  # the base
    with pytest.raises(InputError, match="no finished trials"):
        cost_of(study)
    add(study, 20.0, TrialState.COMPLETE, 0.25)
    add(study, 10.0, TrialState.PRUNED, 0.5)
    add(study, 6.0, TrialState.FAIL, 0.75)
    add(study, 0.0, TrialState.COMPLETE, 0.25, duplicate=True)
    cost = cost_of(study)
    assert (cost.options, cost.sensitivity, cost.trials, cost.per_trial) == (3, 120.0, 3, 12.0)
    assert cost.share == pytest.approx(120 / (120 + 1200))
    write_costs(tmp_path / "costs.md", [cost], {"command": "as typed"})
    report = (tmp_path / "costs.md").read_text()
    assert "| toy | 3 | 120 | 3 | 12.0 | 9.1% |" in report
    assert "kept by 1 of 1 studies" in report
