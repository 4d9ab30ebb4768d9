"""What a search is made of, apart from the study and the workers: the parts that the caller hands in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from evaluators.evaluation import Evaluation
from evaluators.jobs import Job, Rung
from search.study import SearchStudy
from spaces.recipe import Recipe


class Judge(Protocol):
    """Turns an evaluation into what Optuna is told."""

    def values(self, evaluation: Evaluation) -> Sequence[float]:
        """One value per objective, in the study's order. NaN, infinity, or a ValueError or KeyError (a
        metric is missing) fails the trial."""
        ...

    def constraints(self, evaluation: Evaluation) -> Sequence[float]:
        """One number per limit, feasible at or below 0. The base is complete before this is called for
        any other candidate, so limits may be relative to it."""
        ...


class Planner(Protocol):
    """Decides which preparatory jobs (sensitivities, latency probes, ...) come before the first sample."""

    def pending(self) -> Sequence[Job]:
        """Jobs whose results are not in `study.job_results()` yet; empty where all is prepared.

        Called again when those handed out have ended, so a later step may depend on an earlier one. A
        job that failed is not repeated in the same run, though it may be named again.
        """
        ...


@dataclass(frozen=True)
class Verdict:
    """What becomes of a trial at a rung.

    Attributes:
        stop: True ends the trial here.
        reason: one line for the user; empty where it goes on.
        figures: what it was decided by, kept with those of the rung.
    """

    stop: bool
    reason: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


class RungRule(Protocol):
    """Decides at which rungs of its training a candidate is looked at, and whether it goes on."""

    @property
    def epochs(self) -> Sequence[int]:
        """The rungs, by passes over fit; 0 is before any."""
        ...

    def verdict(self, trials: Sequence[FrozenTrial], trial: FrozenTrial, rung: Rung) -> Verdict:
        """Decide from the trials of the study alone, so that any driver would decide the same.

        Args:
            trials: all of the study.
            trial: running; the one that has come to the rung.
            rung: its figures there, which `trials` does not have yet.
        """
        ...


@dataclass(frozen=True)
class SearchParts:
    """
    Attributes:
        distributions: of the Optuna parameters.
        to_recipe: recipe of a complete set of parameters.
        base_params: the parameters of the base; `to_recipe` makes the identity of them.
        judge: values and constraints of an evaluation.
        sampler: makes a sampler from a seed. Called once per run, when the first point is sampled; the
            seed differs from run to run, because a sampler started anew with the same seed proposes
            the same points again.
        seed: the study's seed.
        planner: preparatory jobs, if any.
        on_prepared: called once in the life of a study, when base and preparatory jobs are done; it may
            enqueue trials (`study.optuna.enqueue_trial`).
        after_trial: called after each trial that this driver has told, with its number.
        payload: handed to the worker with every trial.
        rungs: stops candidates in the middle of their training; None lets all of them end it.
    """

    distributions: Mapping[str, BaseDistribution]
    to_recipe: Callable[[dict[str, Any]], Recipe]
    base_params: Mapping[str, Any]
    judge: Judge
    sampler: Callable[[int], BaseSampler]
    seed: int = 0
    planner: Planner | None = None
    on_prepared: Callable[[SearchStudy], None] | None = None
    after_trial: Callable[[SearchStudy, int], None] | None = None
    payload: Mapping[str, Any] | None = None
    rungs: RungRule | None = None
