"""Real studies of one problem beside each other: the hypervolume of their fronts over time and trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from search.benchmarks.curves import Curve, draw_curves
from search.benchmarks.recorded import require_one_problem
from search.benchmarks.replay import normalised_volume
from search.benchmarks.reports import table, write
from search.judge import base_evaluation
from search.knowledge import figures_of
from search.study import SearchStudy
from search.trials import counts, is_stopped
from spaces.errors import InputError

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of the time that all studies have run, and of the trials that all have, at which they are compared."""


@dataclass(frozen=True)
class Course:
    """What a study had reached when.

    Attributes:
        name: of the study.
        minutes: since its first trial began, of each trial that counts, as they ended; stopped ones too.
        volumes: normalised hypervolume after each, 1 for a front that loses nothing and takes no time.
        stopped: number of trials that ended at a rung.
    """

    name: str
    minutes: tuple[float, ...]
    volumes: tuple[float, ...]
    stopped: int

    def at_minute(self, minute: float) -> tuple[float, int]:
        """Hypervolume, and the number of trials, after so long."""
        done = int(np.searchsorted(self.minutes, minute, side="right"))
        return (self.volumes[done - 1] if done else 0.0), done


def course_of(study: SearchStudy) -> Course:
    """Read a study; its front is that of AP on select and measured latency.

    Raises:
        InputError: it has no base yet.
    """
    base = base_evaluation(study)
    if base is None:
        raise InputError("study", study.name, "has no base yet; let the search run until its first trial")
    trials = [trial for trial in study.optuna.get_trials(deepcopy=False) if counts(trial)]
    began = min(trial.datetime_start for trial in trials if trial.datetime_start is not None)
    ended = sorted((t for t in trials if t.datetime_complete is not None), key=_end)
    points, volumes = [], []
    for trial in ended:
        figures = figures_of(trial)
        if figures is not None:
            points.append((base.metrics["map"].value - figures[0], figures[1]))
        volumes.append(normalised_volume(points))
    minutes = tuple((_end(trial) - began).total_seconds() / 60 for trial in ended)
    return Course(study.name, minutes, tuple(volumes), sum(map(is_stopped, ended)))


def courses_of(studies: Sequence[SearchStudy]) -> list[Course]:
    """Read studies that are of one problem.

    Raises:
        InputError: a study was made under other conditions than the first, or has no base.
    """
    require_one_problem(studies)
    return [course_of(study) for study in studies]


def write_courses(file: Path, courses: Sequence[Course], facts: Mapping[str, Any]) -> None:
    """Write the report: all studies after the same time, and after the same number of trials; a picture."""
    minutes = [share * min(course.minutes[-1] for course in courses) for share in SHARES]
    trials = [max(1, round(share * min(len(course.volumes) for course in courses))) for share in SHARES]
    head = [
        "study",
        *[f"{m:.1f} min" for m in minutes],
        *[f"{n} trials" for n in trials],
        "stopped",
        "minutes",
    ]
    rows = []
    for course in courses:
        by_time = ["{:.4f} ({} done)".format(*course.at_minute(minute)) for minute in minutes]
        by_trials = [f"{course.volumes[n - 1]:.4f}" for n in trials]
        rows.append([course.name, *by_time, *by_trials, course.stopped, f"{course.minutes[-1]:.1f}"])
    lines = [
        "Hypervolume of the front on select, up to 15 AP below the base and the base's latency, where 1 is a "
        "front that loses nothing and takes no time. Minutes count from the beginning of the base's trial, "
        "with what is measured before the first candidate. The first columns are after equal time, the next "
        "after equally many trials.",
        "",
        *table(head, rows),
    ]
    write(file, "Studies beside each other", lines, {"courses": [asdict(c) for c in courses]}, facts)
    curves = [
        Curve(course.name, np.array(course.minutes), np.array(course.volumes), ours=course is courses[0])
        for course in courses
    ]
    draw_curves(
        file.with_suffix(".png"),
        curves,
        "Studies beside each other",
        f"{facts['cpu']}; AP on select and latency of exported models",
        "minutes since the base's trial began",
    )


def _end(trial: Any) -> datetime:
    end: datetime = trial.datetime_complete
    return end
