"""Rungs: a candidate that is far from the best ones of its rung is stopped before it is trained to the end.

A multi-objective successive halving that stops and never pauses (Schmucker et al. 2021, "Multi-objective
Asynchronous Successive Halving", arXiv 2106.12639): at each rung the best half of all that came so far go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from numpy.typing import ArrayLike, NDArray
from optuna.trial import FrozenTrial, TrialState

from evaluators.evaluation import Evaluation
from evaluators.jobs import Rung
from evaluators.ranking import MAP_DROP, Problem, non_dominated_ranks
from search.config import KEEP
from search.experience import ExperienceReader
from search.judge import base_evaluation, latency_scale, reference_of
from search.knowledge import LatencyLearner, latency_learner
from search.parts import RungRule, Verdict
from search.study import SearchStudy
from search.trials import (
    DUPLICATE_OF,
    REASON,
    TrialWriter,
    best_figures,
    evaluation_of,
    rung_figures,
    rung_maps,
)
from spaces.table import SpaceTable

COMPANY = 8
"""With fewer candidates at a rung nobody is stopped by comparison: the seeds pass."""
ENOUGH = 5
"""Trained candidates that must have passed a rung before it is said what training can repair."""
MEASURED = 8
"""Timed recipes that a prediction of latency needs."""
SURE = {"size_mb": 0.01, "params": 0.0, "macs": 0.0, "latency_ms": 0.2, "latency_ratio": 0.2}
"""How far a limit must be missed, relative to it: training changes none of these, but a latency is predicted
here and a file may still change by a few bytes."""

Ratios = Callable[[Sequence[FrozenTrial], Sequence[FrozenTrial]], NDArray[np.float64] | None]
"""Predicted latency ratios `(N,)` of N trials, by all trials of the study; None where too little is known."""


def at_rung(study: optuna.Study, rule: RungRule, writer: TrialWriter, rung: Rung) -> Verdict:
    """Decide about a trial that has come to a rung, and write it down.

    A trial that was interrupted comes to its last rung again; what was decided then holds.
    """
    trials = study.get_trials(deepcopy=False)
    trial = next(t for t in trials if t.number == writer.number)
    before = rung_figures(trial).get(rung.epochs)
    if before is not None:
        stop = bool(before.get("stopped"))
        return Verdict(stop, str(trial.user_attrs.get(REASON, "")) if stop else "")
    verdict = rule.verdict(trials, trial, rung)
    figures = {**rung.figures, **verdict.figures, "stopped": float(verdict.stop)}
    writer.reach(rung.epochs, figures, verdict.reason if verdict.stop else "")
    return Verdict(True, "another driver has it now") if writer.lost else verdict


def order(points: ArrayLike) -> list[int]:
    """Indices of `(N, M)` points (lower is better), the best first.

    By non-dominated rank; within a rank as an epsilon-net: the lowest in the first coordinate, then always
    the one farthest from those before it, coordinates scaled by their ranges over all points. So of two that
    are nearly equal one comes late. Where that leaves a tie, the earlier index comes first.
    """
    values = np.asarray(points, float)
    spread = np.ptp(values, axis=0)
    scaled = (values - values.min(axis=0)) / np.where(spread > 0, spread, 1.0)
    ranks = non_dominated_ranks(values)
    return [
        int(k) for rank in range(int(ranks.max()) + 1) for k in _net(scaled, np.nonzero(ranks == rank)[0])
    ]


def _net(scaled: NDArray[np.float64], members: NDArray[np.int64]) -> list[np.int64]:
    points = scaled[members]
    chosen = [int(np.argmin(points[:, 0]))]
    distance = np.full(len(points), np.inf)
    while len(chosen) < len(points):
        distance = np.minimum(distance, np.linalg.norm(points - points[chosen[-1]], axis=1))
        distance[chosen[-1]] = -1.0  # never again
        chosen.append(int(np.argmax(np.round(distance, 12))))
    return list(members[chosen])


def goes_on(place: int, of: int, keep: float = KEEP, company: int = COMPANY) -> bool:
    """Whether the candidate at a place, counted from 1, of so many at a rung is trained on."""
    return of < company or place <= math.ceil(keep * of)


@dataclass(frozen=True)
class HalvingRule:
    """A `search.parts.RungRule`: goes on with the better half of all candidates that came to a rung.

    They are compared by the objectives as far as they are known there: the best mAP up to the rung, which is
    that of an exported file; predicted latency, of all by the same model, since a mixture of predicted and
    measured ones would compare the model's errors; size, parameters and multiplications, which training no
    longer changes. A candidate that misses a limit for sure is stopped in whatever company.

    Attributes:
        study: its base is what losses count against.
        problem: objectives and limits, as the user wrote them.
        epochs: the rungs.
        ratios: predicts latencies.
        keep: share that goes on, rounded up; 1 stops nobody, whatever the limits.
        company: how many must have come to the rung before it stops anybody by comparison.
    """

    study: SearchStudy
    problem: Problem
    epochs: tuple[int, ...]
    ratios: Ratios
    keep: float = KEEP
    company: int = COMPANY

    def verdict(self, trials: Sequence[FrozenTrial], trial: FrozenTrial, rung: Rung) -> Verdict:
        """See `search.parts.RungRule`."""
        peers = [t for t in trials if t.number != trial.number and _has_come(t, rung.epochs)]
        best = max([rung.figures["map"], *rung_maps(trial).values()])
        own = {**rung.figures, "map": best}
        there = [best_figures(peer)[rung.epochs] for peer in peers] + [own]
        ratios = self.ratios(trials, [*peers, trial])
        known: dict[str, float] = {} if ratios is None else {"latency_ratio": float(ratios[-1])}
        after = "before training" if rung.epochs == 0 else f"after epoch {rung.epochs}"
        missed = self._missed(trials, rung.epochs, own, known.get("latency_ratio")) if self.keep < 1 else ""
        if missed:
            return Verdict(True, f"{after}: {missed}", known)
        points = self._points(there, ratios)
        if points is None or len(there) < self.company:
            return Verdict(False, "", known)
        place = order(points).index(len(peers)) + 1
        known |= {"place": float(place), "of": float(len(there))}
        if goes_on(place, len(there), self.keep, self.company):
            return Verdict(False, "", known)
        last = math.ceil(self.keep * len(there))
        return Verdict(True, f"{after}: place {place} of {len(there)}, the first {last} go on", known)

    def _points(
        self, figures: Sequence[Mapping[str, float]], ratios: NDArray[np.float64] | None
    ) -> NDArray[np.float64] | None:
        """`(N, M)`, lower is better; None where the latency counts and cannot be predicted yet."""
        columns: list[NDArray[np.float64]] = []
        timed = any(name.startswith("latency") for name in self.problem.objectives)
        if timed and ratios is None:
            return None
        for name in self.problem.objectives:
            if all(name in one for one in figures):
                column = np.array([one[name] for one in figures])
                columns.append(-column if name == "map" else column)
        if timed and ratios is not None:
            columns.append(ratios)
        return np.stack(columns, axis=1) if columns else None

    def _missed(
        self, trials: Sequence[FrozenTrial], epochs: int, figures: Mapping[str, float], ratio: float | None
    ) -> str:
        """The limit that the candidate cannot keep whatever training brings; empty where there is none."""
        base = base_evaluation(self.study)
        if base is None:
            return ""
        facts = dict(figures)
        if ratio is not None:
            reference_ms = base.metrics["latency_ms"].value if "latency_ms" in base.metrics else math.nan
            here_ms = ratio * reference_ms * latency_scale(self.study)
            facts |= {"latency_ratio": ratio, "latency_ms": here_ms}
        for name, (operator, bound) in self.problem.limits.items():
            if name in SURE and name in facts and operator == "<=" and facts[name] > bound * (1 + SURE[name]):
                said = "predicted " if name.startswith("latency") else ""
                return f"{said}{name} {facts[name]:.4g}, the limit is {bound:g}"
        return self._lost_for_good(trials, epochs, figures["map"], base)

    def _lost_for_good(
        self, trials: Sequence[FrozenTrial], epochs: int, at_rung: float, base: Evaluation
    ) -> str:
        """The limit on mAP that training cannot bring within reach; empty where it may."""
        trained = reference_of(base).metrics["map"].value
        counted = reference_of(base, self.problem.losses_from).metrics["map"].value
        allowed = self.problem.allowed_loss(counted)
        if math.isinf(allowed):
            return ""
        best = trained - self._least_loss(trials, epochs, trained, trained - at_rung)
        if counted - best <= allowed:
            return ""
        if self.problem.limits.get(MAP_DROP) == ("<=", allowed):
            return f"loses {counted - best:.1f} AP even at the best recovery seen, the limit is {allowed:g}"
        _, least = self.problem.limits["map"]
        return f"has {best:.1f} AP even at the best recovery seen, the limit is {least:g}"

    @staticmethod
    def _least_loss(trials: Sequence[FrozenTrial], epochs: int, base_map: float, loss: float) -> float:
        """AP points that stay of a loss at a rung, if training repairs the largest share seen so far.

        Only of candidates that had lost at least half as much: small losses are repaired whole.
        """
        shares = []
        for trial in trials:
            at_rung = rung_maps(trial).get(epochs) if trial.state == TrialState.COMPLETE else None
            if at_rung is None or not (there := base_map - at_rung) > max(loss / 2, 0.5):
                continue
            evaluation = evaluation_of(trial)
            if evaluation is not None and "map" in evaluation.metrics:
                shares.append(max(base_map - evaluation.metrics["map"].value, 0.0) / there)
        return loss * min(shares) if len(shares) >= ENOUGH else -math.inf


def _has_come(trial: FrozenTrial, epochs: int) -> bool:
    """True for a trial with figures at a rung, unless it failed later or is a copy."""
    return (
        trial.state != TrialState.FAIL
        and DUPLICATE_OF not in trial.user_attrs
        and epochs in rung_figures(trial)
    )


class PredictedRatios:
    """`Ratios` by the latency model, fitted to the probes and all finished trials of the study."""

    def __init__(self, table: SpaceTable, study: SearchStudy) -> None:
        self._table, self._study = table, study
        self._reader = ExperienceReader(table)
        self._learner: LatencyLearner | None = None

    def __call__(
        self, trials: Sequence[FrozenTrial], asked: Sequence[FrozenTrial]
    ) -> NDArray[np.float64] | None:
        """See `Ratios`."""
        if self._learner is None:  # not before: probes are measured before the first candidate is trained
            self._learner = latency_learner(self._table, self._study)
        finished = self._reader.read(trials).finished
        if self._learner.probed + len(finished.map) < MEASURED:
            return None
        return self._learner(finished).predict(self._table.options([t.params for t in asked]))
