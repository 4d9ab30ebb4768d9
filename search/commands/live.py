"""`paredown benchmark live` and `sensitivities`: real studies beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from search.commands.options import DEFAULT_STORAGE, RESULTS, Storage, benchmark_facts, say


def live(
    study: Annotated[list[str], typer.Option("--study", help="A study; name two or more, ours first.")],
    storage: Storage = DEFAULT_STORAGE,
    output: Annotated[Path, typer.Option("--output", help="Folder of the report.", metavar="DIR")] = RESULTS,
) -> int:
    """Compare studies of other samplers, seeds or rungs: hypervolume after equal time and equal trials."""
    from search.benchmarks.live import courses_of, write_courses
    from search.study import load_study
    from spaces.errors import InputError

    if len(study) < 2:
        raise InputError("--study", study[0], "name at least two studies, each behind its own --study")
    courses = courses_of([load_study(name, url=storage) for name in study])
    report = output / f"live_{study[0]}.md"
    write_courses(report, courses, benchmark_facts())
    say(report.read_text())
    return 0


def sensitivities(
    study: Annotated[list[str], typer.Option("--study", help="A study; may be repeated.")],
    storage: Storage = DEFAULT_STORAGE,
    output: Annotated[Path, typer.Option("--output", help="Folder of the report.", metavar="DIR")] = RESULTS,
) -> int:
    """What it cost studies to know the damage of every option, beside a hundred of their trials."""
    from search.benchmarks.sensitivity_cost import cost_of, write_costs
    from search.study import load_study

    report = output / "sensitivities.md"
    write_costs(report, [cost_of(load_study(name, url=storage)) for name in study], benchmark_facts())
    say(report.read_text())
    return 0
