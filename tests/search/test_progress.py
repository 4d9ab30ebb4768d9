"""What a search shows on a terminal and elsewhere."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from optuna.trial import create_trial
from rich.console import Console

from evaluators.ranking import Direction
from search.judge import NEW_REFERENCE
from search.owners import driver_of
from search.progress import Point, Progress, describe, duration
from search.source import StudySource
from search.study import SearchStudy, open_study
from search.trials import RECIPE
from tests.search.toy_problem import to_recipe, toy_parts

BASE = Point(0, {"map": 56.9, "latency_ms": 10.0})
BETTER = Point(7, {"map": 57.12, "latency_ms": 6.4})


def test_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with Progress(3, stream) as progress:
        progress.started(0, "trial 0")
        progress.stage(0, "export")
        progress.ended(0, trial=True)
        progress.totals(1, 0)
        progress.points(BASE, [BASE])
        progress.trial_line(0, describe(BASE, BASE))
        progress.totals(3, 1)
        progress.trial_line(8, "failed in stage export: ValueError: [bad] shape", failed=True)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "worker 1: trial 0"
    assert lines[1].startswith("[1/3] trial 0: map 56.9, latency_ms 10 (1.00x) (on the front), about ")
    assert lines[2] == "[3/3] trial 8: failed in stage export: ValueError: [bad] shape"
    assert len(lines) == 3
    assert "\x1b" not in stream.getvalue()


def test_the_panel_shows_workers_totals_and_points() -> None:
    progress = Progress(40, io.StringIO())
    progress.started(0, "trial 11")
    progress.stage(0, "finetune 2/4")
    progress.started(1, "sensitivity 3/8")
    progress.totals(10, 2, 3)
    progress.preparing(3, 8)
    progress.points(BASE, [BETTER, BASE])
    out = io.StringIO()
    Console(file=out, width=100).print(progress)
    shown = out.getvalue()
    for text in (
        "trials 10/40",
        "failed 2",
        "stopped early 3",
        "preparing 3/8",
        "trial 11",
        "finetune 2/4",
        "sensitivity 3/8",
    ):
        assert text in shown
    assert "6.4 (1.56x)" in shown
    assert shown.count("(1.00x)") == 1, "the base is shown once, also where it is on the front"
    assert "57.12" in shown


def test_time_left_shares_the_work_among_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("search.progress.time.monotonic", lambda: now)
    stream = io.StringIO()
    progress = Progress(10, stream, workers=2)
    assert progress.seconds_left() is None
    progress.started(0, "trial 0")
    now = 160.0
    progress.ended(0, trial=True)
    progress.totals(1, 0)
    assert progress.seconds_left() == 9 * 60 / 2
    progress.trial_line(0, "map 57")
    assert stream.getvalue().endswith("about 4 min left\n"), "also when the worker that ended has no new job"
    progress.started(0, "trial 1")
    now = 180.0  # trial 1 has 20 of its 60 seconds behind it
    assert progress.seconds_left() == (9 * 60 - 20) / 2


def study_of(folder: Path, objectives: dict[str, Direction], *trials: dict[str, float]) -> SearchStudy:
    """A study with one finished trial for each set of objective values, the base first."""
    study = open_study("shown", {"detector": "toy"}, objectives, url=f"sqlite:///{folder}/p.db")
    for number, values in enumerate(trials):
        recipe = to_recipe({"a": number / 4})
        study.optuna.add_trial(
            create_trial(values=[values[name] for name in objectives], user_attrs={RECIPE: recipe.to_json()})
        )
    return study


def shown_of(study: SearchStudy) -> str:
    """The panel at the start of a run."""
    progress, out = Progress(10, io.StringIO()), io.StringIO()
    with driver_of(study.optuna) as driver:
        StudySource(study, toy_parts(), driver, 10, progress)
    Console(file=out, width=100).print(progress)
    return out.getvalue()


def test_the_best_points_by_the_first_objective_come_first(tmp_path: Path) -> None:
    trials = [{"map": 60.0 - n, "latency_ms": 10.0 - n} for n in range(3)]
    latency_first: dict[str, Direction] = {"latency_ms": "minimize", "map": "maximize"}
    map_first: dict[str, Direction] = {"map": "maximize", "latency_ms": "minimize"}
    for name, objectives, order in (("a", latency_first, "21"), ("b", map_first, "12")):
        (tmp_path / name).mkdir()
        shown = shown_of(study_of(tmp_path / name, objectives, *trials))
        assert [line.split()[0] for line in shown.splitlines()[-3:]] == ["base", *order]


def test_milliseconds_are_those_of_the_newest_reference(tmp_path: Path) -> None:
    objectives: dict[str, Direction] = {"map": "maximize", "latency_ms": "minimize"}
    study = study_of(
        tmp_path, objectives, {"map": 60.0, "latency_ms": 10.0}, {"map": 59.0, "latency_ms": 8.0}
    )
    study.optuna.set_user_attr(NEW_REFERENCE, {"scale": 2.0})
    shown = shown_of(study)
    assert "20 (1.00x)" in shown
    assert "16 (1.25x)" in shown


def test_the_words() -> None:
    assert describe(BETTER, BASE) == "map 57.12, latency_ms 6.4 (1.56x)"
    assert describe(BETTER, None) == "map 57.12, latency_ms 6.4"
    assert [duration(s) for s in (4.4, 89, 90, 719, 3600, 11100)] == [
        "4 s",
        "89 s",
        "2 min",
        "12 min",
        "60 min",
        "3 h 05 min",
    ]
