"""`paredown benchmark`: published comparisons, each reproducible with one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from search.commands.families import built, finetune, methods
from search.commands.fronts import fronts
from search.commands.live import live, sensitivities
from search.commands.measure import evaluate_profile, importance, latency, predict, quantize, rates, roofline
from search.commands.options import (
    DEFAULT_STORAGE,
    RESULTS,
    Checkpoint,
    Data,
    Storage,
    StudyName,
    benchmark_command,
    config_of,
    overrides,
    say,
)
from search.commands.overhead import overhead
from search.commands.replay import gather, replay_search
from search.commands.rung_replay import replay_rungs

benchmark = typer.Typer(help="Reproduce the published comparisons.", rich_markup_mode=None)

_OF_THIS_MACHINE: Any = {"data": {"root"}, "checkpoint": True, "cache": True}
"""Settings of a study that no other machine shares: paths."""


@benchmark.callback()
def _group() -> None:
    """Reproduce the published comparisons."""


benchmark.command("latency")(latency)
benchmark.command("predict")(predict)
benchmark.command("evaluate")(evaluate_profile)
benchmark.command("quantize")(quantize)
benchmark.command("roofline")(roofline)
benchmark.command("methods")(methods)
benchmark.command("importance")(importance)
benchmark.command("rates")(rates)
benchmark.command("built")(built)
benchmark.command("finetune")(finetune)
benchmark.command("gather")(gather)
benchmark.command("search")(replay_search)
benchmark.command("fronts")(fronts)
benchmark.command("rungs")(replay_rungs)
benchmark.command("live")(live)
benchmark.command("sensitivities")(sensitivities)
benchmark.command("overhead")(overhead)


@benchmark.command("peers")
def peers(
    study: StudyName,
    storage: Storage = DEFAULT_STORAGE,
    data: Data = None,
    checkpoint: Checkpoint = None,
    split: Annotated[
        list[str] | None, typer.Option("--split", help="Where mAP is taken; may be repeated.")
    ] = None,
    slow: Annotated[
        bool, typer.Option("--slow/--quick", help="Also peers that train, or search themselves.")
    ] = True,
    output: Annotated[Path, typer.Option("--output", help="Folder of the report.", metavar="DIR")] = RESULTS,
) -> int:
    """The front of a study beside what others make of the same base, timed in one run."""
    from evaluators.bench import Bench
    from evaluators.exported import ModelCard, model_in
    from evaluators.measuring import BASE_FOLDER, FURTHER_FOLDER
    from search.comparison import MAY_LOSE, TRIAL, compare, facts_of, versions, write_picture, write_report
    from search.front import best_within, front_of, subtitle_of
    from search.judge import base_evaluation, base_number, gain_of_training_further
    from search.peers.all_peers import peers_of
    from search.study import load_study
    from spaces.errors import InputError

    opened = load_study(study, url=storage)
    settings = config_of(opened, overrides(data, checkpoint))
    bench = Bench(settings.bench)
    base, evaluation = base_number(opened), base_evaluation(opened)
    if base is None or evaluation is None:
        raise InputError("study", study, "has no base yet; let the search run until its first trial")
    threads = bench.config.threads
    folder = opened.artifacts / "peers"
    peers = peers_of(bench, model_in(opened.trial_folder(base)), folder, slow, say)
    models, reference = peers.models, next(iter(peers.models))
    further = model_in(opened.artifacts / BASE_FOLDER / FURTHER_FOLDER)
    files = {"base trained further": further} if gain_of_training_further(evaluation) else {}
    front = front_of(opened)
    for number in sorted({row.number for row in front.rows} - {base}):
        files[f"{TRIAL}{number}"] = model_in(opened.trial_folder(number))
    for name, file in files.items():
        if file.is_file():
            session = bench.target.prepare(file, threads, ModelCard.beside(file).runtime.hint)
            models[name] = (session, file)
    splits = split or ["select", "report"]
    rows = compare(bench, models, reference, splits, say)
    report = output / f"peers_{study}.md"
    facts = facts_of(bench, benchmark_command()) | versions()
    facts["result version"] = str(opened.fingerprint["result version"])
    if peers.left_out:
        facts["left out"] = "; ".join(f"{name} ({reason})" for name, reason in peers.left_out.items())
    title = f"Front of {study} and its peers"
    try:
        taken = best_within(front, MAY_LOSE).number
    except InputError:
        taken = None
    shared = settings.model_dump(mode="json", exclude=_OF_THIS_MACHINE)
    write_report(report, title, rows, taken, facts, shared)
    write_picture(report.with_suffix(".png"), front, rows, splits[-1], title, subtitle_of(opened))
    say(report.read_text())
    return 0
