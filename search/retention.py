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
from search.chosen import chosen_numbers, front_numbers
from search.judge import base_number
from search.study import SearchStudy
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
        keep: trials that keep all files; default: the front by the limits that hold now, and by
            those that the trials were told with, which may come back.
    """
    needed = front_numbers(study) | chosen_numbers(study) if keep is None else set(keep)
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
    inside = (os.path.join(parent, name) for parent, _, names in os.walk(path) for name in names)
    total = 0
    for file in [path] if os.path.isfile(path) else inside:
        with suppress(FileNotFoundError):  # workers rename what they have written
            total += os.stat(file).st_size
    return total
