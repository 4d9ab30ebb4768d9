"""`paredown benchmark gather` and `search`: samplers compared on recipes that were really evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from search.commands.options import (
    DEFAULT_STORAGE,
    RESULTS,
    Checkpoint,
    Data,
    Storage,
    benchmark_facts,
    config_of,
    overrides,
    say,
)

RECIPES = RESULTS / "recipes_digits.json"


def gather(
    study: Annotated[list[str], typer.Option("--study", help="A study whose trials count; may be repeated.")],
    storage: Storage = DEFAULT_STORAGE,
    data: Data = None,
    checkpoint: Checkpoint = None,
    add: Annotated[
        Path | None,
        typer.Option("--add", help="A file of earlier recipes of the same problem.", metavar="FILE"),
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="The file to write.", metavar="FILE")] = RECIPES,
) -> int:
    """Write all recipes that some studies evaluated into one small file, for `benchmark search`."""
    from evaluators.bench import Bench
    from search.benchmarks.recorded import gathered, read_recorded
    from search.study import load_study
    from spaces.errors import InputError

    studies = [load_study(name, url=storage) for name in study]
    bench = Bench(config_of(studies[0], overrides(data, checkpoint)).bench)
    recorded = gathered(bench, studies, None if add is None else read_recorded(add))
    try:
        recorded.table()
    except InputError:
        remedy = "its space has bit_widths or a top-k of its own, which a file of recipes does not keep"
        raise InputError("--study", study[0], remedy) from None
    recorded.write(output)
    say(f"{len(recorded.recipes)} recipes of {len(studies)} studies in {output}")
    return 0


def replay_search(
    recipes: Annotated[
        Path, typer.Option("--recipes", help="Written by `benchmark gather`.", metavar="FILE")
    ] = RECIPES,
    seeds: Annotated[int, typer.Option("--seeds", min=2, help="Runs of each sampler.")] = 10,
    trials: Annotated[int, typer.Option("--trials", min=10, help="Trials of each run.")] = 300,
    sampler: Annotated[
        list[str] | None, typer.Option("--sampler", help="One of those compared; may be repeated.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="Runs at a time. Default: one a core.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="Folder of the report.", metavar="DIR")] = RESULTS,
) -> int:
    """Compare samplers on a surrogate of recorded recipes, in minutes."""
    import optuna
    from joblib import cpu_count

    from search.benchmarks.contenders import CONTENDERS, require_contenders
    from search.benchmarks.recorded import read_recorded
    from search.benchmarks.replay import compare
    from search.benchmarks.replay_report import write_comparison

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names = sampler or list(CONTENDERS)
    require_contenders(names)
    recorded = read_recorded(recipes)
    surrogate, outcomes = compare(recorded, names, seeds, trials, say, processes or cpu_count())
    facts = benchmark_facts(optuna=optuna.__version__)
    report = output / f"replay_{recorded.detector.replace(':', '_')}.md"
    write_comparison(report, recorded, surrogate, outcomes, facts)
    say(report.read_text())
    return 0
