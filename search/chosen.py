"""Which trials are on the front: by the limits that each was told with, and by those of now."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache

from optuna.trial import FrozenTrial, TrialState

from evaluators.evaluation import Evaluation
from evaluators.ranking import Problem, front
from search.judge import as_stored, base_evaluation, judged, problem_of
from search.study import SearchStudy
from search.trials import EVALUATION, is_candidate, is_feasible


def front_numbers(study: SearchStudy) -> set[int]:
    """Numbers of the feasible trials that no other feasible one dominates; copies left out."""
    return _undominated(study, [t for t in _complete(study) if is_candidate(t) and is_feasible(t)])


def chosen_numbers(study: SearchStudy) -> set[int]:
    """The front within the limits that a study was last opened with; empty before its base is complete.

    Of a study without a configuration it is `front_numbers`.
    """
    problem = problem_of(study)
    if problem is None:
        return front_numbers(study)
    base = base_evaluation(study)
    return set() if base is None else front_within(study, problem, evaluations_of(_complete(study)), base)


def front_within(
    study: SearchStudy, problem: Problem | None, evaluations: Mapping[int, Evaluation], base: Evaluation
) -> set[int]:
    """The front of the trials that keep the limits of a problem, by the study's own objectives.

    Without a problem the limits count that the trials were told with. A trial that lacks a metric keeps no
    limit on it.

    Args:
        evaluations: of the finished candidates, see `evaluations_of`.
        base: what was measured of the base.
    """
    if problem is None:
        return front_numbers(study)
    stored = as_stored(problem, study)
    kept = set()
    for number, evaluation in evaluations.items():
        with suppress(ValueError):
            if all(excess <= 0.0 for excess in judged(stored, evaluation, base)):
                kept.add(number)
    return _undominated(study, [trial for trial in _complete(study) if trial.number in kept])


def evaluations_of(trials: Iterable[FrozenTrial]) -> dict[int, Evaluation]:
    """What was measured of the finished candidates, by their numbers; to be read, not changed."""
    texts = {t.number: t.user_attrs.get(EVALUATION) for t in trials if is_candidate(t)}
    return {number: _evaluation(text) for number, text in texts.items() if isinstance(text, str)}


@lru_cache(maxsize=4096)
def _evaluation(text: str) -> Evaluation:
    """Finished trials never change, and a search asks for all of them after each trial."""
    return Evaluation.model_validate(json.loads(text))


def _complete(study: SearchStudy) -> list[FrozenTrial]:
    return study.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _undominated(study: SearchStudy, trials: Sequence[FrozenTrial]) -> set[int]:
    signs = [-1.0 if direction == "maximize" else 1.0 for direction in study.objectives.values()]
    losses = [[s * v for s, v in zip(signs, trial.values, strict=True)] for trial in trials]
    return {trials[i].number for i in front(losses)}
