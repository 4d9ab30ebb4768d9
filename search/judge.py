"""What a search tells Optuna about an evaluation, and against which base losses are counted."""

from __future__ import annotations

from evaluators.evaluation import Evaluation
from evaluators.ranking import LossesFrom, Problem
from search.retention import base_number
from search.study import CONFIG, SearchStudy
from search.trials import evaluation_of

TRAINED_FURTHER = "map_trained_further"
CONVERGED_AP = 0.5
"""A base that gains this much from a candidate's own budget of training was not converged."""


class ProblemJudge:
    """A `search.parts.Judge`: objectives and limits of a problem, relative to the study's base.

    Limits on the loss of mAP count against the base trained further where it had not converged, unless the
    problem says `losses_from: given`.
    """

    def __init__(self, study: SearchStudy, problem: Problem) -> None:
        self._study, self._problem = study, problem
        self._base: Evaluation | None = None

    def values(self, evaluation: Evaluation) -> list[float]:
        return self._problem.values(evaluation)

    def constraints(self, evaluation: Evaluation) -> list[float]:
        if self._base is None:
            found = base_evaluation(self._study)
            if found is None:  # `evaluation` is the base
                return self._problem.constraints(evaluation, evaluation)
            self._base = reference_of(found, self._problem.losses_from)
        return self._problem.constraints(evaluation, self._base)


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


def losses_from(study: SearchStudy) -> LossesFrom:
    """The base that the losses of a study count from, as it was last opened."""
    problem = study.optuna.user_attrs.get(CONFIG, {}).get("problem", {})
    return "given" if problem.get("losses_from") == "given" else "trained"
