"""`paredown search`: run a search, or go on with it."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.commands.hints import command, of_study, same_again
from search.commands.options import (
    DEFAULT_STORAGE,
    Checkpoint,
    ConfigFile,
    Data,
    Limits,
    MaxMapDrop,
    OptionalStudyName,
    Seed,
    Storage,
    Target,
    Threads,
    overrides,
    say,
    tell_licence,
)

if TYPE_CHECKING:
    from evaluators.bench import Bench
    from search.config import SearchConfig
    from search.parts import SearchParts
    from search.study import SearchStudy

JUDGES = 500
"""Images of select from which on more of them are not worth a word."""


def search(
    config: ConfigFile,
    data: Data = None,
    checkpoint: Checkpoint = None,
    trials: Annotated[
        int | None,
        typer.Option("--trials", min=1, help="Trials of the study, those of earlier runs included."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Candidates evaluated at a time.")
    ] = None,
    target: Target = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            "--sampler", help="front, tpe, nsga2, nsga3, gp, random, or module:Class.", metavar="NAME"
        ),
    ] = None,
    seeds: Annotated[
        bool | None,
        typer.Option(
            "--seeds/--no-seeds",
            help="Begin with solutions over measured sensitivities, or not; front always does.",
        ),
    ] = None,
    rungs: Annotated[
        bool | None,
        typer.Option("--rungs/--no-rungs", help="Stop candidates early that fall behind, or never."),
    ] = None,
    warm_start: Annotated[
        str | None,
        typer.Option("--warm-start", help="Begin with what another study knows.", metavar="STUDY"),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=0, help="Fine-tuning of each candidate, passes over fit.")
    ] = None,
    max_map_drop: MaxMapDrop = None,
    limit: Limits = None,
    new_reference: Annotated[
        bool,
        typer.Option("--new-reference", help="Go on with a study of another machine or engine version."),
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help="Ray cluster to work on: auto, or HOST:PORT. See search/README.md.",
            metavar="RAY",
        ),
    ] = None,
    storage: Storage = DEFAULT_STORAGE,
    study: OptionalStudyName = None,
    threads: Threads = None,
    seed: Seed = None,
) -> int:
    """Search the trade-off of a detector; called again, go on with the same study.

    The first trial is the base. Ctrl-C stops cleanly; what was finished is in the study.
    """
    from evaluators.pipeline import worker_factory
    from evaluators.targets.registry import signature_here
    from search.config import load_config
    from search.loop import run_search
    from search.progress import Progress, duration
    from search.reference import renew_reference
    from search.source import BaseFailedError
    from search.strategy import sampler_named
    from search.warm_start import take_over
    from search.workers import Pool, WorkersUnusableError, require_cluster
    from spaces.errors import InputError
    from spaces.table import SpaceTable

    changes = overrides(data, checkpoint, target, threads, seed, max_map_drop, limit) | {
        "search.trials": trials,
        "search.workers": workers,
        "search.sampler": sampler,
        "search.seeds": seeds,
        "search.rungs": rungs,
        "search.warm_start": warm_start,
        "finetune.epochs": epochs,
        "name": study,
    }
    settings = load_config(config, changes)
    tell_licence(settings.model)
    _ = settings.rungs  # refused before anything is made
    cores = os.cpu_count()
    if address is None and cores is not None and settings.threads > cores:
        raise InputError("threads", settings.threads, f"this machine has {cores} cores")
    if address is not None:
        require_cluster(address)
    if settings.search.sampler != "front":
        sampler_named(settings.search.sampler)  # before anything is made
    bench = prepared_bench(settings)
    if not bench.space.parameters:
        methods = ", ".join(settings.space.methods) or "none"
        raise InputError("space.methods", methods, "nothing of this detector could change; name others")
    advise(settings, bench)
    source = _warm_source(settings, bench, storage)
    opened = open_for(settings, bench, storage, new_reference)
    say(f"study {opened.name} in {opened.shown_url}")
    if new_reference:
        renew_reference(bench, opened, say)
    if source is not None:
        say(take_over(opened, source, SpaceTable(bench.space)))
    total = settings.search.trials
    signature = bench.target.signature(settings.threads) if address else None
    try:
        outcome = run_search(
            opened,
            _parts(settings, bench, opened),
            worker_factory(settings.bench, opened.artifacts, signature),
            trials=total,
            pool=Pool(
                workers=settings.search.workers,
                threads=settings.threads,
                address=address,
                signature=signature,
                signature_here=partial(signature_here, settings.target, settings.threads)
                if address
                else None,
            ),
            progress=Progress(total, workers=settings.search.workers),
        )
    except (BaseFailedError, WorkersUnusableError) as error:
        print(f"paredown: {error}", file=sys.stderr)
        return 1
    if outcome.stopped:
        say(f"stopped with {outcome.finished} of {total} trials, which are all kept. Go on with")
        say(f"  {same_again('search')}")
        return 130
    early = f", {outcome.stopped_early} stopped early" if outcome.stopped_early else ""
    failed = f", {outcome.failed} failed" if outcome.failed else ""
    say(f"{outcome.finished} trials{early}{failed}, {duration(outcome.seconds)}")
    return _finale(settings, bench, opened, storage)


def prepared_bench(settings: SearchConfig) -> Bench:
    """The bench with its images letterboxed, saying what takes time.

    Raises:
        InputError: anything of the configuration, the data or the weights that cannot be used.
    """
    from evaluators.bench import Bench
    from evaluators.datasets.letterbox import LetterboxedImages

    say(f"reading the data of {settings.name}")
    bench = Bench(settings.bench)
    for role in ("fit", "select"):
        split = bench.splits[role]
        say(f"{role}: {len(split.images)} images of {split.origin}")
        if split.boxes_without_area:
            say(f"  {split.boxes_without_area} boxes without area are not trained on")
        look = bench.detector.preprocess
        LetterboxedImages.build(split, look.size, look.pad_value, settings.cache, _images_done, look.fit)
    return bench


def advise(settings: SearchConfig, bench: Bench) -> None:
    """Say where images that nothing needs for training would tell losses of an AP apart."""
    fit, select = bench.splits["fit"], bench.splits["select"]
    judges = len(select.images)
    if settings.finetune.epochs == 0 and not fit.whole and judges < min(len(fit.images), JUDGES):
        say(f"finetune.epochs is 0: fit trains nothing, and {judges} images tell small losses badly.")
        say("  data.fit_to_select: 0.4 in the configuration would let that share of fit judge, too")


def open_for(settings: SearchConfig, bench: Bench, storage: str, new_reference: bool = False) -> SearchStudy:
    """The study of a configuration, which it keeps.

    Raises:
        InputError: as `search.study.open_study`.
    """
    from search.study import CONFIG, open_study

    problem = settings.problem
    objectives = dict(zip(problem.objectives, problem.directions, strict=True))
    study = open_study(
        settings.name, bench.fingerprint(), objectives, url=storage, new_reference=new_reference
    )
    study.optuna.set_user_attr(CONFIG, settings.model_dump(mode="json"))
    return study


def _warm_source(settings: SearchConfig, bench: Bench, storage: str) -> SearchStudy | None:
    """The study to begin with, checked before anything is made."""
    from search.study import load_study
    from search.warm_start import refuse_unfit

    if settings.search.warm_start is None:
        return None
    source = load_study(settings.search.warm_start, url=storage)
    refuse_unfit(source, bench.fingerprint(), bench.space)
    return source


def _parts(settings: SearchConfig, bench: Bench, study: SearchStudy) -> SearchParts:
    from search.judge import ProblemJudge
    from search.parts import SearchParts
    from search.retention import retain
    from search.rungs import HalvingRule, PredictedRatios
    from search.strategy import Strategy
    from spaces.table import SpaceTable

    def after_trial(study: SearchStudy, _number: int) -> None:
        retain(study, settings.keep_mb)

    strategy = Strategy(bench, study, settings.problem, settings.search.sampler, settings.search.seeds)
    ratios = PredictedRatios(SpaceTable(bench.space), study)
    rule = HalvingRule(study, settings.problem, settings.rungs, ratios, keep=settings.search.keep)
    return SearchParts(
        distributions=bench.space.distributions(),
        to_recipe=bench.space.recipe,
        base_params=bench.space.identity_params(),
        judge=ProblemJudge(study, settings.problem),
        sampler=strategy.sampler,
        seed=settings.seed,
        planner=strategy.planner,
        on_prepared=strategy.on_prepared,
        after_trial=after_trial,
        rungs=rule if settings.rungs else None,
    )


def _finale(settings: SearchConfig, bench: Bench, study: SearchStudy, storage: str) -> int:
    """Measure the front again, unless that was done, and show it with what to do next."""
    from search.commands.front import print_front
    from search.final import is_measured, measure_front
    from search.front import best_within, front_of
    from spaces.errors import InputError

    try:
        if not is_measured(study):
            measure_front(bench, study, say, settings.seed)
    except KeyboardInterrupt:
        say("stopped before the front was measured again; do it later with")
        say(f"  {of_study('front', study.name, storage, '--remeasure')}")
        return 130
    front = front_of(study)
    print_front(study, front, Path("runs") / study.name)
    place = [] if storage == DEFAULT_STORAGE else ["--storage", storage]
    if not front.rows:
        limits = (f"{name} {sign} {bound:g}" for name, (sign, bound) in settings.problem.limits.items())
        say(f"No trial keeps the limits ({', '.join(limits)}). See in a browser how near they came:")
        say(f"  {command('dashboard', *place)}")
        say("Loosen the limits in the configuration under another name, or search on:")
        say(f"  {same_again('search', trials=2 * settings.search.trials)}")
        return 0
    try:
        _, drop = settings.problem.limits.get("map_drop", ("<=", 1.0))
        number = best_within(front, min(drop, 1.0)).number
    except InputError:  # nothing loses so little
        number = front.rows[0].number
    take = ("--trial", str(number), "--output", f"{study.name}-{number}")
    say("")
    say("Look at every trial in a browser:")
    say(f"  {command('dashboard', *place)}")
    say("See what the same models lose on report, which nothing was chosen by:")
    say(f"  {of_study('front', study.name, storage, '--report')}")
    say("Search on:")
    say(f"  {same_again('search', trials=2 * settings.search.trials)}")
    say(f"Take a model, here trial {number}:")
    say(f"  {of_study('finish', study.name, storage, *take)}")
    return 0


def _images_done(done: int, total: int) -> None:
    if done % 500 == 0 and done < total:
        say(f"  {done}/{total} images")
