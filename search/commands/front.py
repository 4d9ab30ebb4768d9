"""`paredown front`: the front of a study as a table, pictures or JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.commands.options import (
    DEFAULT_STORAGE,
    AsJson,
    Checkpoint,
    Data,
    Limits,
    MaxMapDrop,
    Seed,
    Storage,
    StudyName,
    Threads,
    config_of,
    overrides,
)

if TYPE_CHECKING:
    from search.front import Front
    from search.study import SearchStudy


def show_front(
    study: StudyName,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
    report: Annotated[
        bool, typer.Option("--report", help="mAP on report instead of select, where it was measured.")
    ] = False,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="Time the front together again and score it on report.")
    ] = False,
    max_map_drop: MaxMapDrop = None,
    limit: Limits = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder of the pictures; default: runs/STUDY.", metavar="DIR"),
    ] = None,
    data: Data = None,
    checkpoint: Checkpoint = None,
    threads: Threads = None,
    seed: Seed = None,
) -> int:
    """Show the front of a study, and write front.png and front.html.

    Limits filter what is there. --data and --checkpoint say where these are now, for --remeasure;
    --threads must be the study's own; --seed is that of the bootstrap over images.
    """
    from evaluators.ranking import Problem
    from search.front import front_of
    from search.study import load_study

    opened = load_study(study, url=storage)
    problem: Problem | None = None
    if max_map_drop is not None or limit:
        problem = config_of(opened, overrides(max_map_drop=max_map_drop, limits=limit)).problem
    if remeasure:
        _remeasure(opened, data, checkpoint, threads, seed or 0, storage)
    front = front_of(opened, problem, "report" if report else "select")
    if not as_json:
        print_front(opened, front, output or Path("runs") / opened.name)
        return 0
    if output is not None:
        _pictures(opened, front, output)
    for remark in front.remarks:
        _to_stderr(remark)
    print(json.dumps(front.to_json(), indent=1))
    return 0


def print_front(study: SearchStudy, front: Front, folder: Path) -> None:
    """The table of a front with its remarks, and the pictures that were written."""
    from rich.console import Console

    from search.report import front_table

    # Into a file or a pipe a table keeps the width that it was made for.
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    console.print(front_table(front.rows, front.base, title=f"Front of {study.name}"))
    for remark in front.remarks:
        print(f"Note: {remark}.")
    print(f"Pictures: {', '.join(map(str, _pictures(study, front, folder)))}")


def _pictures(study: SearchStudy, front: Front, folder: Path) -> list[Path]:
    from search.front import subtitle_of, write_pictures
    from search.heat_map import heat_map_of

    title = f"Front of {study.name}"
    return write_pictures(front, folder, title, subtitle_of(study), heat_map_of(study))


def _remeasure(
    study: SearchStudy,
    data: Path | None,
    checkpoint: Path | None,
    threads: int | None,
    seed: int,
    storage: str,
) -> None:
    from evaluators.bench import Bench
    from search.final import measure_front
    from search.study import open_study

    settings = config_of(study, overrides(data, checkpoint, threads=threads))
    bench = Bench(settings.bench)
    # Refuses other data, weights, machines: figures of theirs would stand beside those of the study.
    open_study(study.name, bench.fingerprint(), study.objectives, url=storage)
    measure_front(bench, study, _to_stderr, seed)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
