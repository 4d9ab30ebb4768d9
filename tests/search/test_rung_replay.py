"""The replay of rungs: two candidates by hand, and what is read out of a study."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from optuna.trial import TrialState
from toy_problem import toy_study

from search.benchmarks.rung_replay import LEAST, Trained, replay, trained_in, write_replay
from spaces.errors import InputError
from tests.search.test_rungs import add, evaluation


def two(first: float, second: float) -> Trained:
    """Base 60 AP; candidates that end with 50 and 47 AP at half of the latency, with so much at rung 0."""
    at_rung = np.array([[first], [second]])
    return Trained(4, (0,), at_rung, np.array([0.5, 0.5]), np.array([50.0, 47.0]), 60.0)


def test_what_is_saved_and_lost_by_hand() -> None:
    # Volumes to 45 AP and the base's latency: 5 x .5 with the first candidate, 2 x .5 with the second alone.
    right = replay(two(40.0, 10.0), (0,), company=2, orders=20)
    # First, then second: it is the worse of two and stopped before its 4 epochs. The other way round none is.
    assert set(right.trained) == {0.5, 1.0}
    assert right.kept == pytest.approx(np.ones(20))
    wrong = replay(two(10.0, 40.0), (0,), company=2, orders=20)
    assert {(t, round(k, 6)) for t, k in zip(wrong.trained, wrong.kept, strict=True)} == {
        (0.5, 0.4),
        (1.0, 1.0),
    }
    alone = replay(two(10.0, 40.0), (0,), company=3, orders=5)
    assert set(alone.trained) == {1.0}


def test_a_candidate_keeps_its_best_and_is_set_beside_no_rungs() -> None:
    # The first candidate is better before training, shaken at rung 1 and better again in the end.
    at_rung = np.array([[50.0, 40.0], [20.0, 45.0]])
    shaken = Trained(4, (0, 1), at_rung, np.array([0.5, 0.5]), np.array([50.0, 47.0]), 60.0)
    both = replay(shaken, (0, 1), company=2, orders=20)
    assert both.kept == pytest.approx(np.ones(20))
    # By rung 1 alone it is the worse one, and stopped where it comes second: then 2 x .5 of 5 x .5 are left.
    last = replay(shaken, (1,), company=2, orders=20)
    assert set(np.round(last.kept, 6)) == {0.4, 1.0}
    # Stopped after 1 of 4 epochs: (1 + 1/4) / 2 of the training, and round(1.25) = 1 candidate trained by it.
    assert set(last.trained) == {0.625, 1.0}
    assert set(np.round(last.plain, 6)) == {0.4, 1.0}


def test_a_study_that_stopped_nobody_is_replayed(tmp_path: Path) -> None:
    study = toy_study(tmp_path)
    add(study, {}, TrialState.COMPLETE, 60.0)  # the base
    add(study, {0: 1.0}, TrialState.PRUNED)
    for k in range(LEAST):
        if k == LEAST - 1:
            with pytest.raises(InputError, match=f"has {k} candidates that passed all rungs"):
                trained_in(study, 4, 60.0)
        final = 50.0 + k / 4
        add(study, {0: 20.0 + k, 1: 30.0 + k}, TrialState.COMPLETE, final, **evaluation(final, 0.5))
    trained = trained_in(study, 4, 60.0)
    assert trained.rungs == (0, 1)
    assert trained.at_rung[3].tolist() == [23.0, 33.0]
    assert trained.map[3] == 50.75
    file = tmp_path / "rungs.md"
    write_replay(file, "Rungs", trained, {"cpu": "x"}, orders=4)
    assert "1.00 after 0, 1.00 after 1" in file.read_text()
    replays = json.loads(file.with_suffix(".json").read_text())["replays"]
    assert [(one["rungs"], one["keep"]) for one in replays][:4] == [
        ([0], 0.5),
        ([0], 0.67),
        ([0], 0.8),
        ([1], 0.5),
    ]
    # Only the most accurate counts, for all are equally fast, and the rungs rank as the end does.
    assert all(kept == pytest.approx(1.0) for one in replays for kept in one["kept"])
    assert all(one["trained"][0] <= 1.0 for one in replays)
