"""`paredown benchmark fronts`: what samplers found on the surrogate, evaluated for real."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from search.commands.hints import command
from search.commands.options import (
    DEFAULT_STORAGE,
    RESULTS,
    Checkpoint,
    ConfigFile,
    Data,
    Storage,
    StudyName,
    benchmark_facts,
    overrides,
    say,
)
from search.commands.replay import RECIPES

SAMPLERS = ("tpe", "tpe, our seeds", "tpe, 15 of our seeds", "front, solver alone", "front")


def fronts(
    config: ConfigFile,
    study: StudyName,
    recipes: Annotated[
        Path, typer.Option("--recipes", help="Written by `benchmark gather`.", metavar="FILE")
    ] = RECIPES,
    storage: Storage = DEFAULT_STORAGE,
    data: Data = None,
    checkpoint: Checkpoint = None,
    sampler: Annotated[
        list[str] | None, typer.Option("--sampler", help=f"Default: {'; '.join(SAMPLERS)}.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Replays of each sampler.")] = 1,
    trials: Annotated[int, typer.Option("--trials", min=10, help="Trials of each replay.")] = 100,
    output: Annotated[Path, typer.Option("--output", help="Folder of the report.", metavar="DIR")] = RESULTS,
) -> int:
    """Put fronts of replayed samplers into a study of their own; once `search` has run it, report them."""
    import optuna

    from evaluators.bench import Bench
    from search.benchmarks.contenders import require_contenders
    from search.benchmarks.real_fronts import (
        confirmed,
        enqueue,
        replayed_fronts,
        stored_fronts,
        write_confirmed,
    )
    from search.benchmarks.recorded import read_recorded
    from search.commands.search import open_for
    from search.config import load_config

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    require_contenders(sampler or ())
    recorded = read_recorded(recipes)
    settings = load_config(config, overrides(data, checkpoint) | {"name": study})
    opened = open_for(settings, Bench(settings.bench), storage)
    waiting = sum(not t.state.is_finished() for t in opened.optuna.get_trials(deepcopy=False))
    if not stored_fronts(opened):
        found = replayed_fronts(recorded, sampler or SAMPLERS, seeds, trials, say)
        waiting = enqueue(opened, recorded, found)
    if waiting:
        total = str(len(opened.optuna.get_trials(deepcopy=False)))
        say(f"{waiting} recipes wait in study {study}; evaluate them, then call this again for the report:")
        plain = ("--study", study, "--sampler", "random", "--no-seeds", "--no-rungs", "--trials", total)
        say(f"  {command('search', str(config), *plain)}")
        return 0
    rows = confirmed(opened, recorded.table(), recorded.base_map)
    report = output / f"fronts_{recorded.detector.replace(':', '_')}.md"
    write_confirmed(report, recorded, rows, benchmark_facts())
    say(report.read_text())
    return 0
