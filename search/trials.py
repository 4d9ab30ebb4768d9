"""What we write into Optuna trials, and how trials are counted.

User attributes are shown by the dashboard and kept few; bookkeeping goes to system attributes.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from evaluators.evaluation import Evaluation
from search.handover import OWNER, hand_over, owner_in
from spaces.errors import InputError
from spaces.recipe import Recipe

RECIPE = "recipe"
EVALUATION = "evaluation"
STAGE = "stage"
REASON = "reason"
TRACEBACK = "traceback"
DUPLICATE_OF = "duplicate_of"
INTERRUPTED = "interrupted"
"""The stages in which a trial was interrupted so far."""
RUNG_PREFIX = "rung/"
"""Trial attribute `rung/EPOCHS`: figures of the candidate after so many epochs of its fine-tuning."""
JOB_PREFIX = "job/"
"""Study attribute of a preparatory job: `{"result": {...}}` or `{"failure": {"stage", "reason"}}`."""

_DOING = "paredown:doing"
_CRASHES = "paredown:crashes"
_UNCOUNTED = "paredown:uncounted"
_CONSTRAINTS = "constraints"  # Optuna's old attribute: the only one that optuna-dashboard reads
_FIXED = "fixed_params"  # Optuna's name for the parameters of an enqueued trial


def recipe_of(trial: FrozenTrial) -> Recipe | None:
    """The recipe of a trial, None where it was interrupted before it had one."""
    text = trial.user_attrs.get(RECIPE)
    return Recipe.from_json(text) if isinstance(text, str) else None


def evaluation_of(trial: FrozenTrial) -> Evaluation | None:
    """What was measured, None where nothing was."""
    text = trial.user_attrs.get(EVALUATION)
    return Evaluation.model_validate(json.loads(text)) if isinstance(text, str) else None


def rung_figures(trial: FrozenTrial) -> dict[int, dict[str, float]]:
    """Figures by name at each rung that a trial reported, by epochs in ascending order."""
    found = {
        int(key.removeprefix(RUNG_PREFIX)): dict(value)
        for key, value in trial.user_attrs.items()
        if key.startswith(RUNG_PREFIX)
    }
    return dict(sorted(found.items()))


def best_figures(trial: FrozenTrial) -> dict[int, dict[str, float]]:
    """Figures by rung, with the best mAP up to there in the place of the rung's own.

    While steps are large, training shakes what needed no repair: a mild candidate may lose 3 AP points at the
    second rung that it has back in the end, and would look worse there than what was pruned.
    """
    figures = rung_figures(trial)
    best = accumulate((one["map"] for one in figures.values()), max)
    return {epochs: {**one, "map": map_} for (epochs, one), map_ in zip(figures.items(), best, strict=True)}


def rung_maps(trial: FrozenTrial) -> dict[int, float]:
    """The best mAP up to each rung."""
    return {epochs: figures["map"] for epochs, figures in best_figures(trial).items()}


def counts(trial: FrozenTrial) -> bool:
    """True for a trial that uses up one of the total: finished, not interrupted, not a discarded repeat."""
    return trial.state.is_finished() and _UNCOUNTED not in trial.system_attrs


def is_stopped(trial: FrozenTrial) -> bool:
    """True for a trial that was stopped at a rung."""
    return trial.state == TrialState.PRUNED


def is_candidate(trial: FrozenTrial) -> bool:
    """True for a complete trial that is no copy of another one."""
    return trial.state == TrialState.COMPLETE and DUPLICATE_OF not in trial.user_attrs


def is_feasible(trial: FrozenTrial) -> bool:
    """True where the limits were kept that held when the trial was told."""
    return all(c <= 0.0 for c in trial.system_attrs.get(_CONSTRAINTS, ()))


def number_of_files(trial: FrozenTrial) -> int:
    """Whose files a trial has: its own, or of a copy those of the trial that it was copied from."""
    number: int = trial.user_attrs.get(DUPLICATE_OF, trial.number)
    return number


def owner_of(trial: FrozenTrial) -> dict[str, Any] | None:
    owner = trial.system_attrs.get(OWNER)
    return owner if isinstance(owner, dict) else None


def enqueued_params(trial: FrozenTrial) -> dict[str, Any]:
    """The parameters with which a trial was enqueued; empty for a sampled one."""
    return dict(trial.system_attrs.get(_FIXED, {}))


def doing(trial: FrozenTrial) -> str:
    """The stage that a running trial was last known to be in."""
    return str(trial.system_attrs.get(_DOING, "start"))


def give_back(study: optuna.Study, trial: FrozenTrial, *, crashed: bool) -> bool:
    """Put a RUNNING trial back into the queue, under its number, with all that is known of it.

    Args:
        study: of the trial.
        trial: as it was read; another owner than it has here keeps it.
        crashed: True where its driver died. At the second time the trial is ended instead (FAIL, not
            counted), since it may be what kills the drivers; after a clean stop it always goes back.

    Returns:
        True where this call did it.
    """
    stages = [*trial.user_attrs.get(INTERRUPTED, []), doing(trial)]
    crashes = int(trial.system_attrs.get(_CRASHES, 0)) + crashed
    user: dict[str, Any] = {INTERRUPTED: stages}
    system: dict[str, Any] = {_CRASHES: crashes}
    state = TrialState.WAITING
    if crashes > 1:
        state = TrialState.FAIL
        user |= {STAGE: stages[-1], REASON: f"interrupted in stage {stages[-1]}, with its driver again"}
        system |= {_UNCOUNTED: "interrupted"}
    owner = trial.system_attrs.get(OWNER)
    return hand_over(study._storage, trial._trial_id, owner, state, user, system)


class TrialWriter:
    """Writes to one running trial of ours.

    Another driver may have taken the trial for an orphan (we were suspended for longer than the grace
    period): then `lost` turns True and writing does nothing, because the trial is another one's now.
    """

    def __init__(self, study: optuna.Study, trial: optuna.Trial | FrozenTrial) -> None:
        self._study, self.id, self.number = study, trial._trial_id, trial.number
        self._signature: dict[str, Any] | None = None
        self.lost = False

    def claim(self, owner: dict[str, Any], recipe: Recipe | None = None) -> None:
        """Sign the trial. The signature is this claim's own: a driver may come by a trial twice."""
        signature = {**owner, "claim": uuid.uuid4().hex[:12]}
        self._system(OWNER, signature)
        self._signature = signature
        if recipe is not None:
            self._user(RECIPE, recipe.to_json())

    def set_doing(self, stage: str) -> None:
        self._system(_DOING, stage)

    def give_back(self) -> bool:
        """Put the trial back into the queue, unless it is another driver's now; see `give_back`."""
        frozen = self._study._storage.get_trial(self.id)
        return owner_of(frozen) == self._signature and give_back(self._study, frozen, crashed=False)

    def reach(self, epochs: int, figures: Mapping[str, float], reason: str = "") -> None:
        """Write down the figures at a rung and, where the trial is stopped there, why."""
        if reason:
            self._user(REASON, reason)
        self._user(f"{RUNG_PREFIX}{epochs}", dict(figures))

    def stop(self) -> None:
        """Tell PRUNED: stopped at the rung that it has reached. It counts."""
        self._tell(TrialState.PRUNED)

    def stop_like(self, original: FrozenTrial, *, uncounted: bool) -> None:
        """Tell PRUNED with the rungs of a trial of the same recipe that was stopped."""
        for epochs, figures in rung_figures(original).items():
            self.reach(epochs, figures, str(original.user_attrs.get(REASON, "")))
        self._user(DUPLICATE_OF, original.number)
        if uncounted:
            self._system(_UNCOUNTED, "repeat")
        self._tell(TrialState.PRUNED)

    def fail_like(self, original: FrozenTrial, *, uncounted: bool) -> None:
        """Tell FAIL with the stage and the reason of a trial of the same recipe that failed."""
        self._user(DUPLICATE_OF, original.number)
        if uncounted:
            self._system(_UNCOUNTED, "repeat")
        said = original.user_attrs
        self.fail(str(said.get(STAGE, "unknown")), str(said.get(REASON, "no reason given")))

    def complete(
        self,
        values: Sequence[float],
        evaluation: Evaluation,
        constraints: Sequence[float] = (),
        copied_from: int | None = None,
        uncounted: bool = False,
    ) -> None:
        """Tell COMPLETE. Constraints are feasible at or below 0."""
        if constraints:
            self._system(_CONSTRAINTS, [float(c) for c in constraints])
        if copied_from is not None:
            self._user(DUPLICATE_OF, copied_from)
        if uncounted:
            self._system(_UNCOUNTED, "repeat")
        self._user(EVALUATION, json.dumps(evaluation.model_dump()))
        self._tell(TrialState.COMPLETE, values)

    def fail(
        self, stage: str, reason: str, *, evaluation: Evaluation | None = None, traceback: str = ""
    ) -> None:
        """Tell FAIL: the candidate's own failure, which counts."""
        self._user(STAGE, stage)
        self._user(REASON, reason)
        if traceback:
            self._user(TRACEBACK, traceback)
        if evaluation is not None:
            self._user(EVALUATION, json.dumps(evaluation.model_dump()))
        self._tell(TrialState.FAIL)

    def discard(self, reason: str) -> None:
        """Tell FAIL without counting it."""
        self._user(REASON, reason)
        self._system(_UNCOUNTED, "discarded")
        self._tell(TrialState.FAIL)

    def _user(self, key: str, value: Any) -> None:
        self._unless_lost(self._study._storage.set_trial_user_attr, key, value)

    def _system(self, key: str, value: Any) -> None:
        self._unless_lost(self._study._storage.set_trial_system_attr, key, value)

    def _unless_lost(self, write: Any, key: str, value: Any) -> None:
        if self._is_ours():
            try:
                write(self.id, key, value)
            except UpdateFinishedTrialError:
                self.lost = True

    def _is_ours(self) -> bool:
        if not self.lost and self._signature is not None:
            self.lost = owner_in(self._study._storage, self.id) != self._signature
        return not self.lost

    def _tell(self, state: TrialState, values: Sequence[float] | None = None) -> None:
        if not self._is_ours():
            return
        try:  # through Optuna's tell: samplers look at finished trials there
            self._study.tell(self.number, None if values is None else list(values), state)
        except UpdateFinishedTrialError:
            self.lost = True
        except InputError:  # of a user's sampler, which is a ValueError, too
            raise
        except ValueError:
            if self._study._storage.get_trial(self.id).state == TrialState.RUNNING:
                raise
            self.lost = True
