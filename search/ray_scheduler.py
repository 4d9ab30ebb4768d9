"""A Ray Tune scheduler that stops trials at rungs and never pauses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler


class RungScheduler(FIFOScheduler):
    """Runs trials in their order and stops those that are not worth their training.

    It decides nothing from memory of its own: a paused Tune trial, or the rungs of a Tune scheduler, live in
    the process that made them, while a study is resumed and shared by several drivers. So whoever is asked
    here looks into the study.

    Beside that it keeps every worker process for the next job. Tune keeps one idle actor unless trials are
    staged already, and ours never are; without this, two workers that end while there is nothing to do would
    cost a start (import torch) later.

    Args:
        stops: of a trial's id and its result, flat; True stops the trial with this result as its last.
        workers: how many worker processes to keep.
    """

    def __init__(self, stops: Callable[[str, dict[str, Any]], bool], workers: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stops, self._workers, self._told = stops, workers, False

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if self._stops(trial.trial_id, result):
            return TrialScheduler.STOP
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        cache = getattr(tune_controller, "_actor_cache", None)
        if cache is not None and not self._told:
            cache.increase_max(trial.placement_group_factory, by=self._workers)
            self._told = True
