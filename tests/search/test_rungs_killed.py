"""A real study whose driver is killed in the middle of a training: what was trained is not lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import real_problem
import test_loop
import test_workers
from optuna.trial import TrialState

from evaluators.rungs import CHECKPOINT
from search.rungs import order
from search.trials import counts, evaluation_of, is_stopped, rung_figures
from search.workers import Pool

HERE = Path(__file__).resolve().parent


def test_a_killed_trial_goes_on_from_its_last_rung_under_its_number(tmp_path: Path, pool: Pool) -> None:
    study = real_problem.real_study(tmp_path, real_problem.real_bench(tmp_path))
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}
    driver = subprocess.Popen(
        [sys.executable, str(HERE / "real_problem.py"), str(tmp_path), "4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=HERE.parents[1],
        start_new_session=True,
    )

    def trains_its_second_epoch() -> bool:
        trials = study.optuna.get_trials()
        return len(trials) > 1 and trials[1].system_attrs.get("paredown:doing") == "fine-tune 2/2"

    test_loop.wait_for(trains_its_second_epoch, driver, 300)
    family = test_workers.computing(test_workers.session_members(driver.pid))
    driver.kill()
    driver.communicate()
    assert test_workers.left_after(family, 30) == []
    before = study.optuna.get_trials()[1]
    assert before.state == TrialState.RUNNING
    assert list(rung_figures(before)) == [0, 1]
    assert (study.trial_folder(1) / CHECKPOINT).is_file()

    study, outcome = real_problem.run_real(tmp_path, 4, pool)
    assert (outcome.finished, outcome.interrupted, outcome.failed) == (4, 1, 0)
    trials = study.optuna.get_trials()
    first = trials[1]
    assert first.state == TrialState.COMPLETE
    assert first.params == before.params
    assert first.user_attrs["interrupted"] == ["fine-tune 2/2"]
    assert rung_figures(first) == rung_figures(before), "what was decided holds"
    evaluation = evaluation_of(first)
    assert evaluation is not None
    assert {"go on after rung 1", "fine-tune 2/2"} <= evaluation.seconds.keys()
    assert not {"rung 0", "fine-tune 1/2"} & evaluation.seconds.keys()
    assert not (study.trial_folder(1) / CHECKPOINT).exists()

    # All channels that may go are gone: it finds nothing before it is trained, and comes second of two.
    second = trials[2]
    assert is_stopped(second)
    assert counts(second)
    one_shot = rung_figures(second)[0]
    mild = rung_figures(first)[0]
    points = [(-f["map"], f["latency_ratio"]) for f in (mild, one_shot)]
    assert order(points) == [0, 1]
    assert second.user_attrs["reason"] == "before training: place 2 of 2, the first 1 go on"
    assert one_shot["params"] < mild["params"]
