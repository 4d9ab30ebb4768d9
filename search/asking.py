"""Asking Optuna for the next candidate: signed, seeded, and not evaluated twice."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from dataclasses import dataclass

import optuna
from optuna.trial import TrialState

from search.owners import Driver, others_may_live
from search.parts import SearchParts
from search.storage import ask, read_once
from search.study import SearchStudy
from search.trials import (
    DUPLICATE_OF,
    RECIPE,
    TrialWriter,
    enqueued_params,
    evaluation_of,
    is_stopped,
    recipe_of,
)
from spaces.recipe import Recipe

RE_ASKS = 5
"""So many repeats in a row are answered from the study and not counted; the next one counts, so that a
search whose space is used up comes to its end."""
TRIES = 2
"""A recipe that has failed so often is not trained again: the second time it may fare better."""


@dataclass
class Candidate:
    """A trial of ours that is under way."""

    writer: TrialWriter
    recipe: Recipe

    @property
    def number(self) -> int:
        return self.writer.number


class Asker:
    """Asks for candidates and answers repeats of known recipes itself."""

    def __init__(self, study: SearchStudy, parts: SearchParts, driver: Driver) -> None:
        self._study, self._parts, self._driver = study, parts, driver
        self._held: deque[Candidate] = deque()
        self._repeats = 0
        self._seeded = False
        self.twins_of: dict[str, list[Candidate]] = {}
        """Trials of ours that wait for the result of the same recipe, running now, by recipe key."""
        self.base_recipe = parts.to_recipe(dict(parts.base_params))
        if not self.base_recipe.is_identity:
            raise ValueError(f"base_params make {self.base_recipe}, which is not the base")

    def ask_base(self) -> Candidate | None:
        """The base, if its trial waits; other trials that wait are held until it is complete."""
        while self._waiting():
            candidate = self._claim()
            if candidate.recipe.is_identity:
                return candidate
            self.hold(candidate)
        return None

    def enqueue_base(self) -> None:
        self._study.optuna.enqueue_trial(dict(self._parts.base_params))

    def is_base(self, trial: optuna.trial.FrozenTrial) -> bool:
        """True for a trial of the base, also where it is only enqueued."""
        recipe = recipe_of(trial)
        if recipe is not None:
            return recipe.is_identity
        return enqueued_params(trial) == dict(self._parts.base_params)

    def ask(self, running_here: set[str]) -> tuple[Candidate | None, list[tuple[int, int]]]:
        """The next candidate to evaluate.

        Args:
            running_here: keys of the recipes that run in this driver now.

        Returns:
            The candidate, None where only repeats came; and (number, number of the original) of the
            repeats that were answered with a stored result.
        """
        if not self._seeded:  # not for the base: samplers may need what is prepared beside it
            self._study.optuna.sampler = self._parts.sampler(self._run_seed())
            self._seeded = True
        answered: list[tuple[int, int]] = []
        while len(self.twins_of) <= RE_ASKS:
            with read_once(self._study.optuna):
                candidate = self._held.popleft() if self._held else self._claim()
                original = self._original(candidate)
            if original is None and candidate.recipe.key not in running_here:
                self._repeats = 0
                return candidate, answered
            if original is None:
                self.twins_of.setdefault(candidate.recipe.key, []).append(candidate)
                return None, answered
            self._repeats += 1
            counted = self._repeats > RE_ASKS
            self.copy(original, candidate, counted=counted)
            answered.append((candidate.number, original.number))
            if counted:
                return None, answered
        return None, answered

    def copy(self, original: optuna.trial.FrozenTrial, candidate: Candidate, *, counted: bool) -> None:
        """Tell `candidate` what came of the same recipe before."""
        if original.state == TrialState.FAIL:
            candidate.writer.fail_like(original, uncounted=not counted)
            self._driver.release(candidate.writer.id)
            return
        if is_stopped(original):
            candidate.writer.stop_like(original, uncounted=not counted)
            self._driver.release(candidate.writer.id)
            return
        evaluation = evaluation_of(original)
        assert evaluation is not None
        judge = self._parts.judge
        candidate.writer.complete(
            judge.values(evaluation),
            evaluation,
            judge.constraints(evaluation),
            copied_from=original.number,
            uncounted=not counted,
        )
        self._driver.release(candidate.writer.id)

    @property
    def has_held(self) -> bool:
        """True where `ask` needs no new trial."""
        return bool(self._held)

    def hold(self, candidate: Candidate) -> None:
        """Hand this one out before asking for new ones."""
        self._held.append(candidate)

    def held(self) -> list[Candidate]:
        """Trials that are claimed but not handed out."""
        return [*self._held, *(twin for twins in self.twins_of.values() for twin in twins)]

    def _waiting(self) -> bool:
        return bool(self._study.optuna.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def _original(self, candidate: Candidate) -> optuna.trial.FrozenTrial | None:
        """The trial that says what comes of a recipe; failures say it after `TRIES` of them."""
        text = candidate.recipe.to_json()
        states = {TrialState.COMPLETE, TrialState.FAIL}
        if self._parts.rungs:
            states.add(TrialState.PRUNED)
        failed = []
        for trial in self._study.optuna.get_trials(deepcopy=False, states=states):
            if trial.user_attrs.get(RECIPE) != text or DUPLICATE_OF in trial.user_attrs:
                continue
            if trial.state != TrialState.FAIL:
                return trial
            failed.append(trial)
        return failed[-1] if len(failed) >= TRIES else None

    def _claim(self) -> Candidate:
        study = self._study.optuna
        trial = ask(study, self._parts.distributions)
        writer = TrialWriter(study, trial)
        recipe = self._parts.to_recipe(trial.params)
        self._driver.hold(writer.id)  # first: signed and without a heartbeat it would look alive for ever
        writer.claim(self._driver.signature, recipe)
        return Candidate(writer, recipe)

    def _run_seed(self) -> int:
        study = self._study.optuna
        salt = self._driver.owner.driver if others_may_live(study, self._driver) else ""
        return derived_seed(self._parts.seed, len(study.get_trials(deepcopy=False)), salt)


def derived_seed(seed: int, trials: int, salt: str = "") -> int:
    """32 bits from the study's seed, the number of trials so far and, beside other drivers, ourselves."""
    digest = hashlib.sha256(json.dumps([seed, trials, salt]).encode()).digest()
    return int.from_bytes(digest[:4], "big")
