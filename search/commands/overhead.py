"""`paredown benchmark overhead`: what the search itself costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.commands.options import RESULTS, benchmark_facts, say

if TYPE_CHECKING:
    from search.benchmarks.made_up import MadeUpSearch
    from search.benchmarks.overhead import Overhead

CONFIG = Path("scripts/configs/digits.yaml")
PARTS = ("workers", "first-job", "trials", "simulation")


def overhead(
    config: Annotated[
        Path, typer.Argument(metavar="[CONFIG]", help="Whose search is started, to the first job.")
    ] = CONFIG,
    part: Annotated[
        list[str] | None, typer.Option("--part", help=f"{', '.join(PARTS)}; may be repeated. Default: all.")
    ] = None,
    trial_seconds: Annotated[
        float, typer.Option("--trial-seconds", min=0.1, help="Length of a trial of the sleeping workers.")
    ] = 60.0,
    trials: Annotated[int, typer.Option("--trials", min=2, help="Trials of each sleeping worker.")] = 10,
    multiply: Annotated[
        bool, typer.Option("--multiply", help="Workers that keep a core busy in the place of sleeping ones.")
    ] = False,
    finished: Annotated[int, typer.Option("--finished", min=10, help="Finished trials to open.")] = 2000,
    asks: Annotated[int, typer.Option("--asks", min=1, help="Candidates asked for after them.")] = 20,
    parameters: Annotated[int, typer.Option("--parameters", min=2, help="Of each trial.")] = 120,
    simulate: Annotated[
        list[int] | None,
        typer.Option(
            "--simulate", min=2, help="Numbers of workers; may be repeated. Default: 64, 256, 1000."
        ),
    ] = None,
    database: Annotated[
        list[str] | None,
        typer.Option("--database", help="SQLite, PostgreSQL; may be repeated. Default: both."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="Folder of the report.", metavar="DIR")] = RESULTS,
) -> int:
    """Where the time of workers goes, the first job, thousands of trials, hundreds of workers.

    Parts that are not measured stay in the report while machine and versions are the same.
    """
    import optuna
    import ray
    import sqlalchemy

    from evaluators.signature import machine_signature
    from search.benchmarks.databases import POSTGRESQL, SQLITE
    from search.benchmarks.made_up import MadeUpSearch
    from search.benchmarks.overhead import Overhead, measured_before, write_overhead
    from search.benchmarks.sleepers import Work, busy
    from spaces.errors import InputError

    wanted, kinds = part or list(PARTS), database or [SQLITE, POSTGRESQL]
    for field, given, known in (("--part", wanted, PARTS), ("--database", kinds, (SQLITE, POSTGRESQL))):
        for one in given:
            if one not in known:
                raise InputError(field, one, f"choose from {', '.join(known)}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = MadeUpSearch(parameters)
    count = len(search.table.names)
    versions = {module.__name__: module.__version__ for module in (optuna, ray, sqlalchemy)}
    facts = {key: str(value) for key, value in machine_signature().items()} | benchmark_facts(**versions)
    report = output / "overhead.md"
    found = measured_before(report, facts, count) or Overhead(Work(trial_seconds), count)
    for one in wanted:
        found.begin(one, facts)
    if "workers" in wanted:
        found.work = busy(trial_seconds) if multiply else Work(trial_seconds)

    def save() -> None:
        """As it goes: the last simulations take longest."""
        write_overhead(report, found, facts)

    if "first-job" in wanted:
        _first_job(found, config)
        save()
    if "workers" in wanted:
        _workers(found, search, trials)
        save()
    if "trials" in wanted:
        _trials(found, search, kinds, finished, asks)
        save()
    if "simulation" in wanted:
        _simulation(found, search, kinds, simulate or [64, 256, 1000], save)
    say(report.read_text())
    return 0


def _first_job(found: Overhead, config: Path) -> None:
    from search.benchmarks.first_job import seconds_to_first_job

    for _ in range(2):
        said = seconds_to_first_job(config, workers=2)
        say(f"first job after {said[-1][1]:.1f} s: {said[-1][0]}")
        found.first_job.append(said)


def _workers(found: Overhead, search: MadeUpSearch, trials: int) -> None:
    from search.benchmarks.sleepers import run_sleepers

    for count in (1, 2):
        one = run_sleepers(search, found.work, count, trials * count, say)
        found.sleepers[count] = one
        say(f"  {one.trials_per_hour:.1f} trials an hour, {one.useful:.2%} of the workers' time useful")


def _trials(found: Overhead, search: MadeUpSearch, kinds: list[str], finished: int, asks: int) -> None:
    from search.benchmarks.databases import database
    from search.benchmarks.many_trials import measure

    for kind in kinds:
        with database(kind) as (url, folder):
            one = measure(search, kind, url, folder, finished, asks, say)
        found.many.append(one)
        say(
            f"  resume {one.resume_s:.2f} s, ask + tell {one.ask_and_tell_s:.3f} s, front {one.front_s:.2f} s"
        )


def _simulation(
    found: Overhead, search: MadeUpSearch, kinds: list[str], counts: list[int], save: Callable[[], None]
) -> None:
    from search.benchmarks.databases import database
    from search.benchmarks.null_jobs import ray_seconds
    from search.benchmarks.simulation import simulate

    found.ray_s = ray_seconds(say)
    for count in sorted(counts):
        for kind in kinds:
            say(f"{kind}: {count} workers on a virtual clock")
            with database(kind) as (url, folder):
                one = simulate(search, url, folder, count, ray_s=found.ray_s, say=say)
            found.simulated.setdefault(kind, []).append(one)
            save()
            say(f"  {one.trials_per_hour:.0f} trials an hour, the driver busy {one.driver:.0%} of the time")
