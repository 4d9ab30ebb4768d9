"""What stays on disk: models of the front and the base, recipe and state of the rest, within a limit."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from evaluators.jobs import TRIAL_PREFIX, folder_name
from evaluators.ranking import front
from search.study import SearchStudy
from search.trials import is_candidate, is_feasible, recipe_of
from spaces.errors import InputError

STATE_FILES = ("recipe.json", "*.safetensors")
"""From these the model of a trial can be made again, bit for bit."""
_STATE = re.compile("|".join(map(translate, STATE_FILES)))

_NO_MODEL = {
    TrialState.FAIL: "has failed",
    TrialState.PRUNED: "was stopped early",
    TrialState.RUNNING: "is running",
    TrialState.WAITING: "has not begun",
}


@dataclass(frozen=True)
class Kept:
    """What `retain` left: MB (10^6 bytes), trials with all their files, trials with their state only."""

    megabytes: float
    models: tuple[int, ...]
    states: tuple[int, ...]
    over_limit: bool
    """The front alone is larger than the limit; nothing of it was removed."""


def front_numbers(study: SearchStudy) -> set[int]:
    """Numbers of the feasible trials that no other feasible one dominates; copies left out."""
    signs = [-1.0 if direction == "maximize" else 1.0 for direction in study.objectives.values()]
    complete = study.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    trials = [trial for trial in complete if is_candidate(trial) and is_feasible(trial)]
    losses = [[s * v for s, v in zip(signs, trial.values, strict=True)] for trial in trials]
    return {trials[i].number for i in front(losses)}


def base_number(study: SearchStudy) -> int | None:
    """The first complete trial whose recipe changes nothing."""
    for trial in study.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        recipe = recipe_of(trial)
        if recipe is not None and recipe.is_identity and is_candidate(trial):
            return trial.number
    return None


def trial_with_model(study: SearchStudy, number: int) -> FrozenTrial:
    """A trial that came to its end, with a model that was kept or can be made again for some time.

    Raises:
        InputError: no such trial, or one without a model.
    """
    trials = study.optuna.get_trials(deepcopy=False)
    if number >= len(trials):
        raise InputError(
            "--trial", number, f"study {study.name} has {len(trials)} trials, the first of them is 0"
        )
    what = _NO_MODEL.get(trials[number].state)
    if what is not None:
        raise InputError("--trial", number, f"{what} and has no model; choose one of the front")
    return trials[number]


def can_be_made_again(folder: Path) -> bool:
    """True where recipe and state of a trial are still in its folder."""
    return all(any(folder.glob(pattern)) for pattern in STATE_FILES)


def retain(study: SearchStudy, keep_mb: float, keep: Collection[int] | None = None) -> Kept:
    """Remove from the artefact folder what is not worth its place.

    Folders of running and waiting trials are never touched. Of a finished trial that is neither base
    nor on the front only `STATE_FILES` stay; of a failed or stopped one nothing. While the whole is larger
    than `keep_mb`, states go, the oldest first. Whatever happens, the front and the base keep all files.

    Args:
        study: its `trial_folder(number)` is where the files of a trial are.
        keep_mb: limit for the sum of all trial folders.
        keep: trials that keep all files; default `front_numbers(study)`.
    """
    needed = set(front_numbers(study) if keep is None else keep)
    base = base_number(study)
    if base is not None:
        needed.add(base)
    sizes: dict[int, int] = {}
    others = {entry.name: entry.path for entry in os.scandir(study.artifacts)}
    for trial in study.optuna.get_trials(deepcopy=False):
        name = folder_name(trial.number)
        if trial.number in needed or not trial.state.is_finished() or name not in others:
            continue
        folder = others.pop(name)
        if _worth_keeping(trial):
            sizes[trial.number] = _strip(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)

    trials = [path for name, path in others.items() if name.startswith(TRIAL_PREFIX)]
    total = sum(sizes.values()) + sum(map(_bytes, trials))
    for number in sorted(sizes):
        if total <= keep_mb * 1e6:
            break
        shutil.rmtree(study.trial_folder(number), ignore_errors=True)
        total -= sizes.pop(number)
    models = tuple(sorted(n for n in needed if study.trial_folder(n).is_dir()))
    return Kept(total / 1e6, models, tuple(sorted(sizes)), over_limit=total > keep_mb * 1e6)


def _worth_keeping(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.COMPLETE


def _strip(folder: str) -> int:
    """Remove all but the state from a folder; the bytes that stay."""
    stay = 0
    with suppress(FileNotFoundError), os.scandir(folder) as entries:  # another driver may have removed it
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                stay += _strip(entry.path)
                with suppress(OSError):  # it has files that stay
                    os.rmdir(entry.path)
            elif _STATE.match(entry.name):
                stay += entry.stat().st_size
            else:
                Path(entry.path).unlink(missing_ok=True)
    return stay


def _bytes(path: str) -> int:
    """Of a file, or of all that is in a folder; 0 where there is nothing."""
    if os.path.isfile(path):
        return os.stat(path).st_size
    return sum(
        os.stat(os.path.join(parent, name)).st_size for parent, _, names in os.walk(path) for name in names
    )
