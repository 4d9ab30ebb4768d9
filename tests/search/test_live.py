"""Studies beside each other: hypervolume over time by hand, and which studies may be compared."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest
from optuna.trial import TrialState, create_trial
from toy_problem import to_recipe, toy_study

from search.benchmarks.live import Course, course_of, courses_of, write_courses
from search.study import FINGERPRINT, SearchStudy
from search.trials import RECIPE
from spaces.errors import InputError
from tests.search.test_rungs import evaluation

BEGAN = datetime(2026, 11, 27, 12, 0, 0)


def add(study: SearchStudy, minute: float, map_: float | None, ratio: float = 1.0) -> None:
    """A trial that ended so long after the beginning; without mAP it was stopped."""
    number = len(study.optuna.get_trials())
    done = map_ is not None
    trial = create_trial(
        state=TrialState.COMPLETE if done else TrialState.PRUNED,
        values=[map_, 10 * ratio] if done else None,
        user_attrs={
            RECIPE: to_recipe({"a": number / 100}).to_json(),
            **(evaluation(map_, ratio) if map_ is not None else {}),
        },
    )
    trial.datetime_start = BEGAN
    trial.datetime_complete = BEGAN + timedelta(minutes=minute)
    study.optuna.add_trial(trial)


def test_a_course_by_hand(tmp_path: Path) -> None:
    study = toy_study(tmp_path)
    add(study, 1.0, 60.0)
    add(study, 5.0, 57.0, 0.25)  # ends last: (15 - 3) x .75 and (15 - 0) x .5 overlap in 12 x .5
    add(study, 2.0, 60.0, 0.5)
    add(study, 3.0, None)
    course = course_of(study)
    assert course.minutes == pytest.approx((1.0, 2.0, 3.0, 5.0))
    assert course.volumes == pytest.approx((0.0, 0.5, 0.5, (12 * 0.75 + 15 * 0.5 - 12 * 0.5) / 15))
    assert course.stopped == 1
    assert [course.at_minute(m)[1] for m in (0.5, 1.0, 2.5, 9.0)] == [0, 1, 2, 4]
    assert course.at_minute(0.5)[0] == 0.0


def test_studies_without_a_base_or_of_other_problems_are_refused(tmp_path: Path) -> None:
    first, second = toy_study(tmp_path / "a"), toy_study(tmp_path / "b")
    with pytest.raises(InputError, match="has no base yet"):
        course_of(first)
    for study in (first, second):
        add(study, 1.0, 60.0)
    first.optuna.set_user_attr(FINGERPRINT, {"seed": 0})
    second.optuna.set_user_attr(FINGERPRINT, {"seed": 1})
    with pytest.raises(InputError, match="in seed"):
        courses_of([first, second])


def test_the_report_compares_after_equal_time_and_equal_trials(tmp_path: Path) -> None:
    quick = Course("quick", (1.0, 2.0, 3.0, 4.0), (0.0, 0.2, 0.3, 0.4), 0)
    slow = Course("slow", (2.0, 6.0), (0.0, 0.9), 0)
    write_courses(tmp_path / "live.md", [quick, slow], {"cpu": "x"})
    lines = (tmp_path / "live.md").read_text().splitlines()
    assert "| study | 1.0 min | 2.0 min | 3.0 min | 4.0 min | 1 trials" in "\n".join(lines)
    row = next(line for line in lines if line.startswith("| slow"))
    assert row.split(" | ")[1:5] == [
        "0.0000 (0 done)",
        "0.0000 (1 done)",
        "0.0000 (1 done)",
        "0.0000 (1 done)",
    ]
    assert (tmp_path / "live.json").exists()
