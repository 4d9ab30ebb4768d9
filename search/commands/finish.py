"""`paredown finish`: take one model out of a study, verified."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.commands.options import (
    DEFAULT_STORAGE,
    Checkpoint,
    Data,
    Seed,
    Storage,
    StudyName,
    Threads,
    config_of,
    overrides,
    require_place,
    say,
    tell_licence,
)

if TYPE_CHECKING:
    from evaluators.bench import Bench
    from search.study import SearchStudy

GONE = "its files are gone from the artefact folder (see keep_mb)"
TOLERANCE_AP = 0.05
"""Engines of another build may round differently; a wrong file is off by far more."""


def finish(
    study: StudyName,
    output: Annotated[Path, typer.Option("--output", help="New folder of the model.", metavar="DIR")],
    trial: Annotated[
        int | None,
        typer.Option("--trial", min=0, help="Default: the fastest of the front within --max-map-drop."),
    ] = None,
    max_map_drop: Annotated[
        float | None,
        typer.Option(
            "--max-map-drop",
            min=0.0,
            help="AP points that it may lose, measured and likely. Default: 1.0. Not with --trial.",
        ),
    ] = None,
    storage: Storage = DEFAULT_STORAGE,
    data: Data = None,
    checkpoint: Checkpoint = None,
    threads: Threads = None,
    seed: Seed = None,
) -> int:
    """Copy a model and its model.json to a folder, and check that it does what the study says of it.

    --data and --checkpoint say where these are now, if they have moved.
    """
    from evaluators.exported import model_in
    from search.front import best_within, front_of
    from search.study import load_study
    from spaces.errors import InputError

    if trial is not None and max_map_drop is not None:
        remedy = f"chooses a trial, and --trial {trial} is one; keep one of the two"
        raise InputError("--max-map-drop", max_map_drop, remedy)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError("--output", str(output), "is there already; name a new folder")
    require_place("--output", output)
    opened = load_study(study, url=storage)
    number = best_within(front_of(opened), max_map_drop).number if trial is None else trial
    expected = _stored_map(opened, number)
    bench = _bench(opened, overrides(data, checkpoint, threads=threads, seed=seed))
    tell_licence(bench.detector.name)
    beside = output if output.is_dir() else output.parent
    beside.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=beside))
    try:
        how = _put_model(bench, opened, number, draft)
        found, objects = _score(bench, draft)
        if abs(found - expected) > TOLERANCE_AP:
            print(
                f"paredown: trial {number} scores {found:.2f} AP here, the study says {expected:.2f}; "
                "nothing was written",
                file=sys.stderr,
            )
            return 1
        _put_down(draft, output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    say(f"{model_in(output)} and model.json: trial {number} of {opened.name}, {how}")
    say(f"verified: {bench.target.name} loads it and finds {objects} objects on select, {found:.2f} AP")
    say(f"(the study says {expected:.2f}). model.json says how to feed it; nothing of Paredown is needed.")
    return 0


def _stored_map(study: SearchStudy, number: int) -> float:
    """The mAP of a trial on select, as the study has it."""
    from search.retention import trial_with_model
    from search.trials import evaluation_of
    from spaces.errors import InputError

    evaluation = evaluation_of(trial_with_model(study, number))
    if evaluation is None or "map" not in evaluation.metrics:
        raise InputError("--trial", number, f"study {study.name} has no mAP of it; choose one of the front")
    return evaluation.metrics["map"].value


def _put_down(draft: Path, output: Path) -> None:
    """Move a folder to its place."""
    if output.is_dir():  # not replaced: it may be the working directory, or where a disk is mounted
        for file in draft.iterdir():
            os.replace(file, output / file.name)
    else:
        draft.chmod(0o755)
        os.replace(draft, output)


def _bench(study: SearchStudy, changes: dict[str, object]) -> Bench:
    """The bench of a study.

    Raises:
        InputError: its data or weights are gone, or are other ones now.
    """
    from evaluators.bench import Bench
    from spaces.errors import InputError

    bench = Bench(config_of(study, changes).bench)
    stored, now = study.fingerprint, bench.fingerprint()
    for key in ("base weights", "data select", "detector", "input size", "postprocess"):
        if stored.get(key) != now[key]:
            raise InputError(key, now[key], f"study {study.name} was made with {stored.get(key)}")
    return bench


def _put_model(bench: Bench, study: SearchStudy, number: int, folder: Path) -> str:
    """Copy the pair of a trial, or make it again from its stored state; says which."""
    from evaluators.exported import CARD_FILE, model_in
    from search.retention import can_be_made_again
    from search.trials import evaluation_of, number_of_files, recipe_of
    from spaces.apply import rebuild
    from spaces.effects import bits_by_layer
    from spaces.errors import InputError

    trials = study.optuna.get_trials(deepcopy=False)
    source = study.trial_folder(number_of_files(trials[number]))
    if model_in(source).is_file() and (source / CARD_FILE).is_file():
        for file in (model_in(source), source / CARD_FILE):
            shutil.copyfile(file, folder / file.name)
        return "copied"
    if not can_be_made_again(source):
        raise InputError("--trial", number, GONE)
    recipe, evaluation = recipe_of(trials[number]), evaluation_of(trials[number])
    assert recipe is not None
    assert evaluation is not None, "its mAP was read before"
    bench = bench.at(recipe)
    recipe, draft = rebuild(bench.detector.build(), source)
    draft.network.eval()
    bits = bits_by_layer(recipe, bench.sites)
    _, card = bench.export(draft.network, bits, recipe, folder, draft.learned)
    figures = {name: measured.value for name, measured in evaluation.metrics.items()}
    card.model_copy(update={"figures": {**figures, "split": evaluation.split}}).write(folder)
    return "made again from its stored weights"


def _score(bench: Bench, folder: Path) -> tuple[float, int]:
    """mAP on select, and the number of objects found, of the exported pair in a folder."""
    from evaluators.exported import ModelCard, model_in

    model = model_in(folder)
    card = ModelCard.beside(model)
    with bench.slot.computing():
        bench = bench.at(card.recipe)
        session = bench.target.prepare(model, bench.config.threads, card.runtime.hint)
    figures, found = bench.scored(session)
    return figures["map"], sum(len(one.scores) for one in found.values())
