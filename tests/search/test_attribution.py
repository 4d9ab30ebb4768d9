"""A trial taken apart by models that are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optuna
import pytest
from rich.console import Console

from evaluators.evaluation import Measurement
from search.attribution import attributed, explain
from search.commands.explain import explanation_table
from search.judge import NEW_REFERENCE
from search.loss_model import LossModel
from search.sensitivity import single_changes
from search.study import SearchStudy, open_study
from search.trials import evaluation_of
from spaces.errors import InputError
from tests.search.test_sampler import MadeUp
from tests.search.test_solver import random_damage, toy_model
from tests.search.toy_space import toy_table


def test_choices_by_hand() -> None:
    table = toy_table()
    model, damage = toy_model(table), random_damage(table, 0)
    options = np.zeros(len(table.names), np.int64)
    options[[0, -1]] = 1
    trial = optuna.trial.create_trial(
        values=[1.0, 2.0], params=table.params(options), distributions=table.space.distributions()
    )
    found = attributed(table, trial, LossModel(damage, 2.0 * damage), model, 10.0, (3.0, 4.0))
    losses = {choice.parameter: choice.loss for choice in found.choices}
    assert losses == pytest.approx({table.names[p]: 2 * damage[p, 1] for p in (0, len(options) - 1)})
    assert [c.loss for c in found.choices] == sorted(losses.values(), reverse=True)
    whole = float(model.predict(options[None])[0])
    for choice in found.choices:
        without = options.copy()
        without[table.names.index(choice.parameter)] = 0
        assert choice.saved_ms == pytest.approx(10 * (float(model.predict(without[None])[0]) - whole))
        assert choice.undone == table.space.parameters[choice.parameter].values[0]
    assert found.summed_loss == pytest.approx(found.predicted_loss)
    assert (found.measured_loss, found.measured_saved_ms) == (3.0, 4.0)


def filled_study(folder: Path, problem: MadeUp, further: float | None = None) -> SearchStudy:
    """A study in a file with the sensitivities, and the trials of a run in memory.

    Args:
        further: mAP of the base after a candidate's training.
    """
    study = open_study(
        "s",
        {"detector": "toy"},
        {"map": "maximize", "latency_ms": "minimize"},
        url=f"sqlite:///{folder}/p.db",
    )
    changes = {recipe.key: problem.damage[p, o] for p, o, recipe in single_changes(problem.table.space)}
    study.optuna.set_user_attr("job/sensitivity 1/1", {"result": {"damage": changes}})
    for trial in problem.run(problem.sampler(0), 6).get_trials():
        evaluation = evaluation_of(trial)
        assert evaluation is not None
        assert "latency_ms" in evaluation.metrics
        if further is not None and trial.number == 0:
            evaluation.metrics["map_trained_further"] = Measurement(value=further, unit="AP")
            trial.set_user_attr("evaluation", evaluation.model_dump_json())
        study.optuna.add_trial(trial)
    return study


def test_of_a_study(tmp_path: Path) -> None:
    problem = MadeUp()
    study = filled_study(tmp_path, problem)
    found = explain(study, problem.table, 3)
    quality, ratio = study.optuna.get_trials()[3].values
    assert found.measured_loss == pytest.approx(60.0 - quality)
    assert found.measured_saved_ms == pytest.approx((1 - ratio) * 20.0)
    changed = np.nonzero(problem.table.options([study.optuna.get_trials()[3].params])[0])[0]
    assert {choice.parameter for choice in found.choices} == {problem.table.names[p] for p in changed}
    assert explain(study, problem.table, 0).choices == []
    console = Console(width=100, record=True, quiet=False, file=(tmp_path / "shown").open("w"))
    console.print(explanation_table(found))
    text = console.export_text()
    assert "attributions by models" in text
    assert f"{quality - 60.0:.2f}".lstrip("-") in text
    assert found.to_json()["choices"][0]["parameter"] == found.choices[0].parameter


def test_figures_count_as_those_of_the_front_do(tmp_path: Path) -> None:
    """The base gains 1.4 AP from training, and takes 40 ms on the machine of a new reference."""
    problem = MadeUp()
    study = filled_study(tmp_path, problem, further=61.4)
    study.optuna.set_user_attr(NEW_REFERENCE, {"scale": 2.0})
    quality, ratio = study.optuna.get_trials()[3].values
    trained = explain(study, problem.table, 3)
    assert trained.measured_saved_ms == pytest.approx((1 - ratio) * 40.0)
    assert trained.measured_loss == pytest.approx(61.4 - quality)
    assert trained.predicted_loss == pytest.approx(trained.summed_loss)
    assert trained.counted == "Losses count from the base trained further, 61.40 AP."
    study.optuna.set_user_attr("config", {"problem": {"losses_from": "given"}})
    given = explain(study, problem.table, 3)
    assert given.measured_loss == pytest.approx(60.0 - quality)
    assert given.predicted_loss == pytest.approx(given.summed_loss - 1.4)
    assert "as it came, 60.00 AP" in given.counted


def test_what_cannot_be_explained(tmp_path: Path) -> None:
    problem = MadeUp()
    study = filled_study(tmp_path, problem)
    with pytest.raises(InputError, match="trials 0 to 5"):
        explain(study, problem.table, 6)
    study.optuna.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL))
    with pytest.raises(InputError, match="no recipe"):
        explain(study, problem.table, 6)
