"""What a search tells Optuna about an evaluation, and against which base losses are counted."""

from __future__ import annotations

from optuna.trial import TrialState

from evaluators.evaluation import Evaluation
from evaluators.ranking import TRAIN_STEP, LossesFrom, Problem
from search.study import CONFIG, SearchStudy
from search.trials import evaluation_of, is_candidate, recipe_of

TRAINED_FURTHER = "map_trained_further"
NEW_REFERENCE = "new reference"
"""Study attribute: the base measured again on another machine; see `search.reference`."""
CONVERGED_AP = 0.5
"""A base that gains this much from a candidate's own budget of training was not converged."""


class ProblemJudge:
    """A `search.parts.Judge`: objectives and limits of a problem, relative to the study's base.

    Limits on the loss of mAP count against the base trained further where it had not converged, unless the
    problem says `losses_from: given`.
    """

    def __init__(self, study: SearchStudy, problem: Problem) -> None:
        self._study, self._problem = study, as_stored(problem, study)
        self._base: Evaluation | None = None

    def values(self, evaluation: Evaluation) -> list[float]:
        return self._problem.values(with_step_of(self._found_base() or evaluation, evaluation))

    def constraints(self, evaluation: Evaluation) -> list[float]:
        base = self._found_base()
        if base is None:  # `evaluation` is the base
            return self._problem.constraints(evaluation, evaluation)
        return judged(self._problem, evaluation, base)

    def _found_base(self) -> Evaluation | None:
        if self._base is None:
            self._base = base_evaluation(self._study)
        return self._base


def base_number(study: SearchStudy) -> int | None:
    """The first complete trial whose recipe changes nothing."""
    for trial in study.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        recipe = recipe_of(trial)
        if recipe is not None and recipe.is_identity and is_candidate(trial):
            return trial.number
    return None


def base_evaluation(study: SearchStudy) -> Evaluation | None:
    """What was measured of the study's base; None before it is complete."""
    number = base_number(study)
    return None if number is None else evaluation_of(study.optuna.get_trials(deepcopy=False)[number])


def gain_of_training_further(base: Evaluation) -> float:
    """AP that the base gains from a candidate's budget; 0 where it had converged or was not trained."""
    further = base.metrics.get(TRAINED_FURTHER)
    gain = 0.0 if further is None else further.value - base.metrics["map"].value
    return gain if gain >= CONVERGED_AP else 0.0


def reference_of(base: Evaluation, counted_from: LossesFrom = "trained") -> Evaluation:
    """The base that losses count from: with the mAP of further training where that gains, or as given."""
    if counted_from == "given" or not gain_of_training_further(base):
        return base
    metrics = {**base.metrics, "map": base.metrics[TRAINED_FURTHER]}
    return base.model_copy(update={"metrics": metrics})


def allowed_loss(problem: Problem, base: Evaluation) -> float:
    """AP points below the trained base that the limits of a problem allow; infinity without such a limit."""
    trained = reference_of(base).metrics["map"].value
    counted = reference_of(base, problem.losses_from).metrics["map"].value
    return problem.allowed_loss(counted) + trained - counted


def judged(problem: Problem, evaluation: Evaluation, base: Evaluation) -> list[float]:
    """The constraints of an evaluation, see `Problem.constraints`, against a study's base.

    Raises:
        ValueError: a metric that has a limit is missing.
    """
    counted = reference_of(base, problem.losses_from)
    return problem.constraints(with_step_of(base, evaluation), counted)


def with_step_of(base: Evaluation, evaluation: Evaluation) -> Evaluation:
    """An evaluation of a candidate; one that kept the base's weights takes the base's training steps."""
    if TRAIN_STEP in evaluation.metrics or TRAIN_STEP not in base.metrics:
        return evaluation
    metrics = {**evaluation.metrics, TRAIN_STEP: base.metrics[TRAIN_STEP]}
    return evaluation.model_copy(update={"metrics": metrics})


def problem_of(study: SearchStudy) -> Problem | None:
    """The problem that a study was last opened with; None where it was made without a configuration."""
    document = study.optuna.user_attrs.get(CONFIG)
    return None if document is None else Problem.read(document.get("problem", {}))


def latency_scale(study: SearchStudy) -> float:
    """What trials hold in ms is of the first reference; times this it is of the newest one's machine."""
    return float(study.optuna.user_attrs.get(NEW_REFERENCE, {}).get("scale", 1.0))


def as_stored(problem: Problem, study: SearchStudy) -> Problem:
    """A problem with its limits in ms, of the newest reference's machine, on the scale of the trials."""
    scale = latency_scale(study)
    if "latency_ms" not in problem.limits or scale == 1.0:
        return problem
    operator, bound = problem.limits["latency_ms"]
    return problem.model_copy(update={"limits": {**problem.limits, "latency_ms": (operator, bound / scale)}})
