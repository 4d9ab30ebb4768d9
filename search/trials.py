"""What we write into Optuna trials, and how trials are counted.

User attributes are shown by the dashboard and kept few; bookkeeping goes to system attributes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from evaluators.evaluation import Evaluation
from spaces.recipe import Recipe

RECIPE = "recipe"
EVALUATION = "evaluation"
STAGE = "stage"
REASON = "reason"
TRACEBACK = "traceback"
DUPLICATE_OF = "duplicate_of"
RETRY_OF = "retry_of"
RUNG_PREFIX = "rung/"
"""Trial attribute `rung/EPOCHS`: figures of the candidate after so many epochs of its fine-tuning."""
JOB_PREFIX = "job/"
"""Study attribute of a preparatory job: `{"result": {...}}` or `{"failure": {"stage", "reason"}}`."""

_OWNER = "paredown:owner"
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


def rung_maps(trial: FrozenTrial) -> dict[int, float]:
    """mAP by rung."""
    return {epochs: figures["map"] for epochs, figures in rung_figures(trial).items()}


def counts(trial: FrozenTrial) -> bool:
    """True for a trial that uses up one of the total: finished, not interrupted, not a discarded repeat."""
    return trial.state.is_finished() and _UNCOUNTED not in trial.system_attrs


def is_candidate(trial: FrozenTrial) -> bool:
    """True for a complete trial that is no copy of another one."""
    return trial.state == TrialState.COMPLETE and DUPLICATE_OF not in trial.user_attrs


def is_feasible(trial: FrozenTrial) -> bool:
    """True where the limits were kept that held when the trial was told."""
    return all(c <= 0.0 for c in trial.system_attrs.get(_CONSTRAINTS, ()))


def finished_count(study: optuna.Study) -> int:
    """How many trials count towards the total."""
    return sum(map(counts, study.get_trials(deepcopy=False)))


def owner_of(trial: FrozenTrial) -> dict[str, Any] | None:
    owner = trial.system_attrs.get(_OWNER)
    return owner if isinstance(owner, dict) else None


def enqueued_params(trial: FrozenTrial) -> dict[str, Any]:
    """The parameters with which a trial was enqueued; empty for a sampled one."""
    return dict(trial.system_attrs.get(_FIXED, {}))


def doing(trial: FrozenTrial) -> str:
    """The stage that a running trial was last known to be in."""
    return str(trial.system_attrs.get(_DOING, "start"))


class TrialWriter:
    """Writes to one running trial of ours.

    Another driver may have taken the trial for an orphan (we were suspended for longer than the grace
    period): then `lost` turns True and writing does nothing, because the trial is finished.
    """

    def __init__(self, study: optuna.Study, trial: optuna.Trial | FrozenTrial) -> None:
        self._study, self.id, self.number = study, trial._trial_id, trial.number
        self.lost = False

    def claim(self, owner: dict[str, Any], recipe: Recipe | None = None) -> None:
        self._system(_OWNER, owner)
        if recipe is not None:
            self._user(RECIPE, recipe.to_json())

    def set_doing(self, stage: str) -> None:
        self._system(_DOING, stage)

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

    def interrupt(self, frozen: FrozenTrial, *, crashed: bool) -> bool:
        """Tell FAIL "interrupted", uncounted, and enqueue the same parameters again.

        Args:
            frozen: the trial as it is stored.
            crashed: True where its driver died. Such a trial is enqueued again only once, since it may
                be what killed the driver; after a clean stop it is always enqueued again.

        Returns:
            True where this call interrupted the trial, False where it was finished already.
        """
        stage = doing(frozen)
        self._user(STAGE, stage)
        self._user(REASON, f"interrupted in stage {stage}")
        self._system(_UNCOUNTED, "interrupted")
        if not self._set_state(TrialState.FAIL):
            return False
        crashes = int(frozen.system_attrs.get(_CRASHES, 0)) + crashed
        params = {**frozen.system_attrs.get(_FIXED, {}), **frozen.params}
        if params and crashes <= 1:
            self._study.add_trial(
                create_trial(
                    state=TrialState.WAITING,
                    system_attrs={_FIXED: params, _CRASHES: crashes},
                    user_attrs={RETRY_OF: self.number},
                )
            )
        return True

    def _user(self, key: str, value: Any) -> None:
        self._unless_lost(self._study._storage.set_trial_user_attr, key, value)

    def _system(self, key: str, value: Any) -> None:
        self._unless_lost(self._study._storage.set_trial_system_attr, key, value)

    def _unless_lost(self, write: Any, key: str, value: Any) -> None:
        if not self.lost:
            try:
                write(self.id, key, value)
            except UpdateFinishedTrialError:
                self.lost = True

    def _tell(self, state: TrialState, values: Sequence[float] | None = None) -> None:
        if self.lost:
            return
        try:  # through Optuna's tell: samplers look at finished trials there
            self._study.tell(self.number, None if values is None else list(values), state)
        except UpdateFinishedTrialError:
            self.lost = True
        except ValueError:
            if not self._study._storage.get_trial(self.id).state.is_finished():
                raise
            self.lost = True

    def _set_state(self, state: TrialState) -> bool:
        if self.lost:
            return False
        try:
            return self._study._storage.set_trial_state_values(self.id, state)
        except UpdateFinishedTrialError:
            self.lost = True
            return False
