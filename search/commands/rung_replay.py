"""`paredown benchmark rungs`: how much training the rungs save, and what they lose."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from search.commands.options import (
    DEFAULT_STORAGE,
    RESULTS,
    Storage,
    StudyName,
    benchmark_facts,
    config_of,
    overrides,
    say,
)


def replay_rungs(
    study: StudyName,
    storage: Storage = DEFAULT_STORAGE,
    orders: Annotated[int, typer.Option("--orders", min=2, help="Random orders of the candidates.")] = 50,
    output: Annotated[Path, typer.Option("--output", help="Folder of the report.", metavar="DIR")] = RESULTS,
) -> int:
    """Replay a study whose candidates were all trained to the end (search.keep: 1) with rungs that stop."""
    from search.benchmarks.rung_replay import trained_in, write_replay
    from search.judge import base_evaluation
    from search.study import load_study
    from spaces.errors import InputError

    opened = load_study(study, url=storage)
    base = base_evaluation(opened)
    if base is None:
        raise InputError("study", study, "has no base yet; let the search run until its first trial")
    epochs = config_of(opened, overrides()).finetune.epochs
    trained = trained_in(opened, epochs, base.metrics["map"].value)
    report = output / f"rungs_{study}.md"
    write_replay(report, f"Rungs replayed on {study}", trained, benchmark_facts(), orders)
    say(report.read_text())
    return 0
