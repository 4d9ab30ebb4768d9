"""What one study takes from another: exact results only where all agrees, seeds and weights always."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from evaluators.bench import Bench
from evaluators.jobs import Job
from evaluators.ranking import Problem
from search.chosen import front_numbers
from search.knowledge import WARM, measured_damage
from search.preparation import PREPARED
from search.sensitivity import CHUNKS, sensitivity_jobs, sensitivity_of, single_changes, store_sensitivity
from search.strategy import Strategy
from search.study import SearchStudy, open_study
from search.trials import enqueued_params
from search.warm_start import refuse_unfit, take_over, warm_seeds
from spaces.errors import InputError
from spaces.recipe import Recipe
from tests.search.test_sampler import MadeUp

FINGERPRINT: dict[str, Any] = {
    "detector": "toy",
    "input size": "16x16",
    "base weights": "00ff",
    "data fit": "f",
    "data select": "s",
    "importance": "taylor",
    "calibration images": 32,
    "seed": 0,
    "result version": 1,
    "target": "openvino",
    "fine-tuning": "3 epochs",
    "space": "prune",
}


def new_study(folder: Path, name: str, **changed: Any) -> SearchStudy:
    objectives: Any = {"map": "maximize", "latency_ms": "minimize"}
    return open_study(name, FINGERPRINT | changed, objectives, url=f"sqlite:///{folder}/p.db")


def damage_result(problem: MadeUp, job: Job) -> dict[str, Any]:
    by_key = {recipe.key: float(problem.damage[p, o]) for p, o, recipe in single_changes(problem.table.space)}
    return {"damage": {k: by_key[k] for k in (Recipe.from_json(t).key for t in job.payload["recipes"])}}


@pytest.fixture(scope="module")
def problem() -> MadeUp:
    return MadeUp()


@pytest.fixture
def source(tmp_path: Path, problem: MadeUp) -> SearchStudy:
    study = new_study(tmp_path, "source")
    for job in sensitivity_jobs(problem.table.space, CHUNKS):
        study.optuna.set_user_attr(f"job/{job.name}", {"result": damage_result(problem, job)})
    study.optuna.set_user_attr("job/probe 1/2", {"result": {"recipe": "r", "ratio": 0.5}})
    store_sensitivity(study, sensitivity_of(problem.table, problem.damage))
    for trial in problem.run(problem.sampler(0), 8).get_trials():
        study.optuna.add_trial(trial)
    return study


def test_all_is_taken_where_only_the_budget_differs(
    tmp_path: Path, problem: MadeUp, source: SearchStudy
) -> None:
    study = new_study(tmp_path, "new", **{"fine-tuning": "9 epochs"})
    line = take_over(study, source, problem.table)
    jobs = len(sensitivity_jobs(problem.table.space, CHUNKS))
    assert f"{jobs} of {jobs} sensitivity jobs, 1 latency probes" in line
    assert {k: v["damage"] for k, v in study.job_results().items() if "sensitivity" in k} == {
        k: v["damage"] for k, v in source.job_results().items() if "sensitivity" in k
    }
    weights = study.optuna.user_attrs[WARM]["weights"]
    factors = np.array([weights[name] for name in problem.table.names])
    found = measured_damage(problem.table, study)
    assert found is not None
    plain = measured_damage(problem.table, source)
    np.testing.assert_allclose(found, plain * factors[:, None])  # type: ignore[operator]
    assert len(set(factors)) > 1  # its trials told kinds of choices apart


@pytest.mark.parametrize(
    ("changed", "sensitivities", "probes"),
    [
        ({"target": "onnxruntime"}, True, 0),
        ({"data fit": "other"}, False, 1),
        ({"base weights": "11ee"}, False, 0),
        ({"importance": "magnitude"}, False, 1),
        ({"result version": 2}, False, 0),
        ({"space": "prune, quantize"}, True, 0),
    ],
)
def test_results_are_taken_only_where_all_that_they_depend_on_agrees(
    tmp_path: Path, problem: MadeUp, source: SearchStudy, changed: Any, sensitivities: bool, probes: int
) -> None:
    study = new_study(tmp_path, "new", **changed)
    line = take_over(study, source, problem.table)
    assert any("sensitivity" in name for name in study.job_results()) == sensitivities
    assert sum("probe" in name for name in study.job_results()) == probes
    assert f"{probes} latency probes" in line
    assert warm_seeds(study)


def test_seeds_are_the_front_of_the_other_study(tmp_path: Path, problem: MadeUp, source: SearchStudy) -> None:
    study = new_study(tmp_path, "new")
    take_over(study, source, problem.table)
    trials = source.optuna.get_trials()
    front = [trials[n].params for n in front_numbers(source) if n]
    assert warm_seeds(study)
    assert all(params in front for params in warm_seeds(study))


def test_their_seeds_are_enqueued_without_any_of_our_own(
    tmp_path: Path, problem: MadeUp, source: SearchStudy
) -> None:
    study = new_study(tmp_path, "new")
    take_over(study, source, problem.table)
    bench = cast(Bench, SimpleNamespace(space=problem.table.space, config=SimpleNamespace(seed=0)))
    Strategy(bench, study, Problem(), "tpe", seeds=False).on_prepared(study)
    assert [t.user_attrs["origin"] for t in study.optuna.get_trials()] == ["warm start"] * len(
        warm_seeds(study)
    )
    assert warm_seeds(study)


def test_a_driver_that_was_killed_while_it_enqueued_leaves_no_seed_twice(
    tmp_path: Path, problem: MadeUp, source: SearchStudy
) -> None:
    study = new_study(tmp_path, "new")
    take_over(study, source, problem.table)
    study.optuna.enqueue_trial(warm_seeds(study)[0], user_attrs={"origin": "warm start"})
    bench = cast(Bench, SimpleNamespace(space=problem.table.space, config=SimpleNamespace(seed=0)))
    Strategy(bench, study, Problem(), "tpe", seeds=False).on_prepared(study)
    assert [enqueued_params(trial) for trial in study.optuna.get_trials()] == warm_seeds(study)


def test_their_damage_stands_in_for_what_could_not_be_measured(
    tmp_path: Path, problem: MadeUp, source: SearchStudy
) -> None:
    study = new_study(tmp_path, "new", **{"data fit": "other"})
    take_over(study, source, problem.table)
    study.optuna.set_user_attr("job/sensitivity 1/1", {"result": {"damage": {}}})
    found = measured_damage(problem.table, study)
    assert found is not None
    weights = study.optuna.user_attrs[WARM]["weights"]
    factors = np.array([weights[name] for name in problem.table.names])
    np.testing.assert_allclose(found, problem.damage * factors[:, None], rtol=1e-4)


def test_what_stands_in_is_weighted_once_however_long_the_chain(
    tmp_path: Path, problem: MadeUp, source: SearchStudy
) -> None:
    """The second study began with the first, measured damage of its own, and has no trials yet."""
    second, third = (new_study(tmp_path, name, **{"data fit": name}) for name in ("second", "third"))
    take_over(second, source, problem.table)
    for job in sensitivity_jobs(problem.table.space, CHUNKS):
        second.optuna.set_user_attr(f"job/{job.name}", {"result": damage_result(problem, job)})
    damage = measured_damage(problem.table, second)
    assert damage is not None
    store_sensitivity(second, sensitivity_of(problem.table, damage))
    take_over(third, second, problem.table)
    third.optuna.set_user_attr("job/sensitivity 1/1", {"result": {"damage": {}}})
    found = measured_damage(problem.table, third)
    assert found is not None
    np.testing.assert_allclose(found, damage, rtol=1e-4)


def test_it_is_done_once_and_never_to_a_study_under_way(
    tmp_path: Path, problem: MadeUp, source: SearchStudy
) -> None:
    study = new_study(tmp_path, "new")
    take_over(study, source, problem.table)
    before = study.optuna.user_attrs
    assert "has begun with source already" in take_over(study, source, problem.table)
    assert study.optuna.user_attrs == before
    late = new_study(tmp_path, "late")
    late.optuna.set_user_attr(PREPARED, True)
    assert "under way" in take_over(late, source, problem.table)
    assert warm_seeds(late) == []


def test_studies_that_do_not_fit_are_one_clear_line(
    tmp_path: Path, problem: MadeUp, source: SearchStudy
) -> None:
    space = problem.table.space
    refuse_unfit(source, FINGERPRINT | {"target": "onnxruntime"}, space)
    with pytest.raises(
        InputError, match="detector: 'toy' -> 'ssd'; input size: '16x16' -> '32x32'"
    ) as refused:
        refuse_unfit(source, FINGERPRINT | {"detector": "ssd", "input size": "32x32"}, space)
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="no sensitivities"):
        refuse_unfit(new_study(tmp_path, "empty"), FINGERPRINT, space)
