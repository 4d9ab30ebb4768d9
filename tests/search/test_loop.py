"""Whole searches over the toy problem: real workers, real databases, killed and stopped drivers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fake_workers
import pytest
import test_workers
import toy_problem
from optuna.trial import TrialState
from toy_problem import toy_parts, toy_study

from evaluators.jobs import Job
from search.asking import derived_seed
from search.chosen import front_numbers
from search.loop import run_search
from search.progress import Progress
from search.source import BaseFailedError
from search.study import SearchStudy
from search.trials import counts, recipe_of
from search.workers import Pool

HERE = Path(__file__).resolve().parent


def summary(study: SearchStudy) -> Counter[str]:
    return Counter(trial.state.name for trial in study.optuna.get_trials())


def counted(study: SearchStudy) -> int:
    return sum(map(counts, study.optuna.get_trials()))


def test_a_search_on_postgresql(tmp_path: Path, pool: Pool, postgres: str) -> None:
    study = toy_study(tmp_path, f"loop-{tmp_path.name}", postgres)
    outcome = run_search(study, toy_parts(), fake_workers.ToyWorker, trials=6, pool=pool)
    assert (outcome.finished, outcome.failed, outcome.stopped) == (6, 0, False)
    for trial in study.optuna.get_trials():
        assert trial.values == list(fake_workers.score(trial.params))


def test_a_search_ends_with_its_total_and_goes_on_from_there(tmp_path: Path, pool: Pool) -> None:
    study = toy_study(tmp_path)
    told: list[int] = []
    parts = toy_parts(after_trial=lambda _, number: told.append(number))
    outcome = run_search(study, parts, fake_workers.ToyWorker, trials=6, pool=pool)
    assert (outcome.finished, outcome.failed, outcome.stopped) == (6, 0, False)
    trials = study.optuna.get_trials()
    base = recipe_of(trials[0])
    assert base is not None
    assert base.is_identity
    assert trials[0].values == [80.0, 10.0]
    assert all(trial.datetime_start >= trials[0].datetime_complete for trial in trials[1:])  # type: ignore[operator]
    for trial in trials:
        assert trial.values == list(fake_workers.score(trial.params))
        assert trial.system_attrs["constraints"] == [(60.0 - trial.values[0]) / 20.0]
    assert sorted(told) == [t.number for t in trials if "duplicate_of" not in t.user_attrs]

    again = run_search(study, parts, fake_workers.ToyWorker, trials=6, pool=pool)
    assert again.seconds < 5  # nothing to do: Ray is not even asked
    assert len(study.optuna.get_trials()) == len(trials)

    reopened = toy_study(tmp_path)
    assert run_search(reopened, parts, fake_workers.ToyWorker, trials=9, pool=pool).finished == 9
    recipes = [
        t.user_attrs["recipe"] for t in reopened.optuna.get_trials() if "duplicate_of" not in t.user_attrs
    ]
    assert len(recipes) == len(set(recipes)), "a recipe was evaluated twice"


def test_candidates_that_fail_crash_or_are_nan_count_and_are_explained(tmp_path: Path, pool: Pool) -> None:
    study = toy_study(tmp_path)
    for trouble in (0.25, 0.5, 0.75):
        study.optuna.enqueue_trial({"a": 0.25, "b": 0.0, "c": trouble})
    outcome = run_search(study, toy_parts("abc"), fake_workers.ToyWorker, trials=4, pool=pool)
    assert (outcome.finished, outcome.failed) == (4, 3)
    failed = {t.params["c"]: t for t in study.optuna.get_trials(states=(TrialState.FAIL,))}
    assert failed[0.25].user_attrs["reason"] == "ValueError: loss is not finite"
    assert "fake_workers.py" in failed[0.25].user_attrs["traceback"]
    assert failed[0.5].user_attrs["stage"] == "finetune"
    assert "process died" in failed[0.5].user_attrs["reason"]
    assert failed[0.75].user_attrs["stage"] == "score"
    assert failed[0.75].user_attrs["reason"] == "map is nan"
    base = study.optuna.get_trials(states=(TrialState.COMPLETE,))
    assert [t.values for t in base] == [[80.0, 10.0]]


def test_failures_of_one_kind_in_a_row_are_told_once_and_end_nothing(
    tmp_path: Path, pool: Pool, capsys: pytest.CaptureFixture[str]
) -> None:
    study = toy_study(tmp_path)
    for a in (0.25, 0.5, 0.75):
        for b in (0.25, 0.5):
            study.optuna.enqueue_trial({"a": a, "b": b, "c": 0.25})
    progress = Progress(7)
    outcome = run_search(
        study, toy_parts("abc"), fake_workers.ToyWorker, trials=7, pool=pool, progress=progress
    )
    assert (outcome.finished, outcome.failed) == (7, 6)
    assert " ".join(capsys.readouterr().out.split()).count("5 trials in a row failed like this") == 1


def test_a_small_space_is_evaluated_once_and_the_search_still_ends(tmp_path: Path, pool: Pool) -> None:
    study = toy_study(tmp_path)
    outcome = run_search(study, toy_parts("a"), fake_workers.ToyWorker, trials=7, pool=pool)
    assert outcome.finished == 7
    complete = study.optuna.get_trials(states=(TrialState.COMPLETE,))
    originals = {t.number: t for t in complete if "duplicate_of" not in t.user_attrs}
    assert sorted(t.params["a"] for t in originals.values()) == toy_problem.STEPS
    for trial in complete:
        if "duplicate_of" in trial.user_attrs:
            assert trial.values == originals[trial.user_attrs["duplicate_of"]].values
    assert set(summary(study)) == {"COMPLETE"}
    # 80-30a and 10-5a: every step trades one for the other, but 57.5 AP is below the limit of 60.
    assert {originals[n].params["a"] for n in front_numbers(study)} == {0.0, 0.25, 0.5}


class TwoStepPlanner:
    """Three sensitivities, of which one fails; then a probe that needs their results."""

    def __init__(self, study: SearchStudy) -> None:
        self.study = study
        self.handed_out: list[str] = []

    def pending(self) -> Sequence[Job]:
        stored = self.study.job_results()
        names = [f"sensitivity {i}/3" for i in (1, 2, 3)]
        jobs = [
            Job(kind="sensitivity", name=name, payload={"trouble": "raise"} if "2/3" in name else {})
            for name in names
            if name not in stored
        ]
        if len(stored) >= 2 and "probe 1" not in stored:
            jobs = [Job(kind="probe", name="probe 1", payload={"seen": len(stored)})]
        self.handed_out += [job.name for job in jobs]
        return jobs


def test_preparatory_jobs_come_first_and_are_never_repeated(tmp_path: Path, pool: Pool) -> None:
    study = toy_study(tmp_path)
    planner = TwoStepPlanner(study)
    prepared: list[dict[str, Any]] = []

    def enqueue(prepared_study: SearchStudy) -> None:
        prepared.append(prepared_study.job_results())
        assert summary(prepared_study) == {"COMPLETE": 1}, "the base, and no sampled trial yet"
        prepared_study.optuna.enqueue_trial({"a": 0.5, "b": 0.5})

    parts = toy_parts(planner=planner, on_prepared=enqueue)
    run_search(study, parts, fake_workers.ToyWorker, trials=3, pool=pool)
    assert [sorted(results) for results in prepared] == [["probe 1", "sensitivity 1/3", "sensitivity 3/3"]]
    failure = study.optuna.user_attrs["job/sensitivity 2/3"]["failure"]
    assert failure == {"stage": "finetune", "reason": "ValueError: loss is not finite"}
    assert study.optuna.get_trials()[1].params == {"a": 0.5, "b": 0.5}

    run_search(study, parts, fake_workers.ToyWorker, trials=4, pool=pool)
    assert len(prepared) == 1
    assert counted(study) == 4


def test_a_failing_base_ends_the_search_and_is_tried_again(tmp_path: Path, pool: Pool) -> None:
    study = toy_study(tmp_path)
    broken = toy_parts(payload={"trouble": "raise"})
    with pytest.raises(BaseFailedError, match=r"ValueError: loss is not finite \(.*fake_workers.py, line"):
        run_search(study, broken, fake_workers.ToyWorker, trials=3, pool=pool)
    assert summary(study) == {"FAIL": 1}
    run_search(study, toy_parts(), fake_workers.ToyWorker, trials=3, pool=pool)
    assert summary(study) == {"FAIL": 1, "COMPLETE": 2}


def test_every_run_gets_a_seed_of_its_own() -> None:
    seeds = {derived_seed(0, 0), derived_seed(0, 10), derived_seed(1, 0), derived_seed(0, 0, "other driver")}
    assert len(seeds) == 4
    assert derived_seed(0, 10) == derived_seed(0, 10)


# -- drivers of their own

DRIVER = """
import sys
from pathlib import Path
import fake_workers, toy_problem
from search.loop import run_search
from search.progress import Progress
from search.workers import Pool
folder, total, worker = Path(sys.argv[1]), int(sys.argv[2]), getattr(fake_workers, sys.argv[3])
study = toy_problem.toy_study(folder)
outcome = run_search(study, toy_problem.toy_parts(), worker, trials=total, pool=Pool(workers=2),
                     progress=Progress(total))
print(outcome, flush=True)
"""


def start(folder: Path, total: int, worker: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder), str(total), worker],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=HERE.parents[1],
        start_new_session=True,
    )


def wait_for(condition: Callable[[], bool], driver: subprocess.Popen[str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def test_a_killed_driver_loses_nothing(tmp_path: Path, pool: Pool) -> None:
    study = toy_study(tmp_path)
    driver = start(tmp_path, 12, "SlowWorker")
    wait_for(lambda: counted(study) >= 3 and summary(study)["RUNNING"] >= 1, driver)
    family = test_workers.computing(test_workers.session_members(driver.pid))
    assert len(family) >= 4  # driver, raylet, gcs server, workers ...
    driver.kill()
    driver.communicate()
    assert test_workers.left_after(family, 20) == []
    before = {t.number: t.values for t in study.optuna.get_trials() if t.state == TrialState.COMPLETE}
    running = [t.number for t in study.optuna.get_trials() if t.state == TrialState.RUNNING]
    parameters = {n: study.optuna.get_trials()[n].params for n in running}
    assert 3 <= len(before) < 12
    assert running

    outcome = run_search(study, toy_parts(), fake_workers.ToyWorker, trials=12, pool=pool)
    trials = study.optuna.get_trials()
    assert outcome.finished == 12
    assert outcome.interrupted == len(running)
    assert "RUNNING" not in summary(study)
    assert {n: trials[n].values for n in before} == before
    for number in running:  # under the same number, with the same recipe
        assert trials[number].state == TrialState.COMPLETE
        assert trials[number].user_attrs["interrupted"][0] in ("start", "prune", "finetune", "score")
        assert trials[number].params == (parameters[number] or trials[number].params)
    assert sum(map(counts, trials)) == 12
    assert all(counts(t) or "duplicate_of" in t.user_attrs for t in trials)


def test_a_terminated_driver_returns_its_trials(tmp_path: Path) -> None:
    study = toy_study(tmp_path)
    driver = start(tmp_path, 12, "EndlessWorker")

    def base_is_trained() -> bool:
        return any(t.system_attrs.get("paredown:doing") == "finetune" for t in study.optuna.get_trials())

    wait_for(base_is_trained, driver)
    driver.send_signal(signal.SIGTERM)  # Ctrl-C: see test_workers
    out, err = driver.communicate(timeout=40)
    assert err == ""
    assert "SearchOutcome(finished=0, failed=0, interrupted=1, stopped=True" in out
    assert driver.returncode == 0
    assert summary(study) == {"WAITING": 1}
    assert study.optuna.get_trials()[0].user_attrs["interrupted"] == ["finetune"]


def test_two_drivers_share_a_study(tmp_path: Path) -> None:
    study = toy_study(tmp_path)
    drivers = [start(tmp_path, 10, "SlowWorker") for _ in range(2)]
    for driver in drivers:
        out, err = driver.communicate(timeout=90)
        assert err == ""
        assert "stopped=False" in out
    trials = study.optuna.get_trials()
    assert "RUNNING" not in summary(study)
    assert 10 <= sum(map(counts, trials)) <= 11
    owners = {t.system_attrs["paredown:owner"]["driver"] for t in trials if counts(t)}
    assert len(owners) == 2
    assert sum(t.params == {"a": 0.0, "b": 0.0} and "duplicate_of" not in t.user_attrs for t in trials) == 1
