"""The study as a source of jobs: the base, the preparatory jobs, then one sampled trial after another."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from pydantic import ValidationError

from evaluators.evaluation import Evaluation
from evaluators.jobs import Job, StageReport
from search.asking import Asker, Candidate
from search.chosen import chosen_numbers
from search.failures import IN_A_ROW, Streak
from search.judge import base_number, latency_scale
from search.owners import Driver, recover_orphans
from search.parts import SearchParts
from search.preparation import PREPARED, Preparation
from search.progress import Point, Progress, describe
from search.rungs import at_rung
from search.storage import read_once
from search.study import SearchStudy
from search.trials import REASON, counts, is_candidate, is_stopped
from search.workers import FINISHED, Finished
from spaces.documents import refused
from spaces.errors import own_place

_IDLE_SECONDS = 1.0
_RECOVER_SECONDS = 30.0


class BaseFailedError(RuntimeError):
    """The base model itself could not be evaluated, so there is nothing to compare with."""

    def __init__(self, stage: str, reason: str, traceback: str = "") -> None:
        self.stage, self.reason = stage, reason
        place = own_place(traceback)
        shown = f" ({place}; the whole traceback is with its trial in the dashboard)" if place else ""
        super().__init__(f"the base model failed in stage {stage}: {reason}{shown}")


@dataclass
class _Running:
    job: Job
    candidate: Candidate | None  # None for preparatory jobs
    worker: int = 0


class StudySource:
    """A `JobSource` over a study. The state is the study; what is here is only about running jobs.

    Order: the base; preparatory jobs (also beside the base); `on_prepared`; trials, of which none is
    asked for before the base is complete. Trials that other drivers run count towards the total.
    """

    def __init__(
        self, study: SearchStudy, parts: SearchParts, driver: Driver, total: int, progress: Progress
    ) -> None:
        self._study, self._parts, self._driver = study, parts, driver
        self._total, self._progress = total, progress
        self._asker = Asker(study, parts, driver)
        self._preparation = Preparation(study, parts.planner, driver)
        self._running: dict[str, _Running] = {}
        self._streak = Streak()
        rungs = {} if parts.rungs is None else {"rungs": list(parts.rungs.epochs)}
        self._payload = {**(parts.payload or {}), **rungs}
        self._latency_scale = latency_scale(study)
        self._idle_until = 0.0
        self._recovered_at = time.monotonic()
        self.interrupted_count = 0
        self._refresh()

    # -- what to do next

    def next_job(self) -> Job | Finished | None:
        if time.monotonic() < self._idle_until:
            return None
        job = self._choose()
        if job is None:
            self._idle_until = time.monotonic() + _IDLE_SECONDS
        return job

    def is_finished(self) -> bool:
        """True where the study has its trials already."""
        return self._is_full(self._trials())

    def _trials(self) -> list[FrozenTrial]:
        return self._study.optuna.get_trials(deepcopy=False)

    def _is_full(self, trials: list[FrozenTrial]) -> bool:
        return sum(map(counts, trials)) >= self._total and self._base_complete(trials)

    def _base_complete(self, trials: list[FrozenTrial]) -> bool:
        return any(is_candidate(t) and self._asker.is_base(t) for t in trials)

    def _choose(self) -> Job | Finished | None:
        trials = self._trials()
        if self._is_full(trials):
            return None if self._running else FINISHED
        base_complete = self._base_complete(trials)
        if not base_complete:
            candidate = self._base(trials)
            if candidate is not None:
                return self._start(candidate, " (base)")
        job = self._preparation.next_job()
        if job is not None:
            self._running[job.name] = _Running(job, None)
            return job
        if not base_complete or not self._preparation.is_over:
            return None
        if not self._study.optuna.user_attrs.get(PREPARED):
            if not self._preparation.claim(PREPARED):
                return None  # another driver is at it
            if self._parts.on_prepared is not None:
                self._parts.on_prepared(self._study)
            self._study.optuna.set_user_attr(PREPARED, True)
            trials = self._trials()
        under_way = sum(t.state == TrialState.RUNNING for t in trials)
        if sum(map(counts, trials)) + under_way >= self._total and not self._asker.has_held:
            return None  # what runs, here or in other drivers, may fill the study
        return self._ask()

    def _base(self, trials: list[FrozenTrial]) -> Candidate | None:
        live = (TrialState.RUNNING, TrialState.WAITING)
        if not any(t.state in live and self._asker.is_base(t) for t in trials):
            self._asker.enqueue_base()
        return self._asker.ask_base()

    def _ask(self) -> Job | None:
        here = {r.candidate.recipe.key for r in self._running.values() if r.candidate is not None}
        candidate, answered = self._asker.ask(here)
        for number, original in answered:
            self._progress.say(f"trial {number}: same recipe as trial {original}, its result is taken over")
        return None if candidate is None else self._start(candidate)

    def _start(self, candidate: Candidate, remark: str = "") -> Job:
        job = Job(
            kind="trial",
            name=f"trial {candidate.number}{remark}",
            number=candidate.number,
            recipe=candidate.recipe,
            seed=self._parts.seed,
            payload=self._payload,
        )
        self._running[job.name] = _Running(job, candidate)
        return job

    # -- what came of it

    def started(self, job: Job, worker: int) -> None:
        self._running[job.name].worker = worker
        self._progress.started(worker, job.name)

    def progress(self, job: Job, report: StageReport) -> None:
        running = self._running[job.name]
        self._progress.stage(running.worker, report.next_stage)
        if running.candidate is not None and report.next_stage:
            running.candidate.writer.set_doing(report.next_stage)

    def rung(self, job: Job, report: StageReport) -> bool:
        candidate = self._running[job.name].candidate
        if candidate is None or self._parts.rungs is None or report.rung is None:
            return False
        return at_rung(self._study.optuna, self._parts.rungs, candidate.writer, report.rung).stop

    def stopped(self, job: Job) -> None:
        candidate = self._end(job).candidate
        assert candidate is not None
        self._streak.end()
        candidate.writer.stop()
        stored = self._study.optuna._storage.get_trial(candidate.writer.id)
        self._told(candidate, lambda: f"stopped early, {stored.user_attrs.get(REASON, '')}")

    def done(self, job: Job, result: dict[str, Any]) -> None:
        running = self._end(job)
        if running.candidate is None:
            self._preparation.finish(job, result)
            self._show_preparation()
            return
        try:
            evaluation = Evaluation.model_validate(result)
        except ValidationError as error:
            self._fail(running.candidate, "result", f"no evaluation: {refused(error)}")
            return
        self._judge(running.candidate, evaluation)

    def failed(self, job: Job, stage: str, reason: str, traceback: str) -> None:
        running = self._end(job)
        if running.candidate is None:
            self._preparation.fail(job, stage, reason)
            self._progress.say(f"{job.name} failed in stage {stage}: {reason}")
            self._show_preparation()
        else:
            self._fail(running.candidate, stage, reason, traceback=traceback)

    def interrupted(self, job: Job, stage: str) -> None:
        running = self._end(job)
        if running.candidate is None:
            self._preparation.give_back(job)
        else:
            self._return(running.candidate)

    def tick(self) -> None:
        if time.monotonic() - self._recovered_at >= _RECOVER_SECONDS:
            self._recovered_at = time.monotonic()
            self.recover()
            self._refresh()

    def recover(self) -> None:
        """Take over what dead drivers left RUNNING."""
        for number, stage in recover_orphans(self._study.optuna, self._driver):
            self.interrupted_count += 1
            self._progress.say(f"trial {number}: its driver is gone, interrupted in stage {stage}")

    def close(self) -> None:
        """Give back the trials that were claimed but never handed out."""
        for candidate in self._asker.held():
            self._return(candidate)

    def _end(self, job: Job) -> _Running:
        self._idle_until = 0.0
        running = self._running.pop(job.name)
        candidate = running.candidate
        self._progress.ended(running.worker, trial=candidate is not None and not candidate.recipe.is_identity)
        return running

    def _judge(self, candidate: Candidate, evaluation: Evaluation) -> None:
        if evaluation.failure is not None or evaluation.status == "failed":
            stage = evaluation.failure.stage if evaluation.failure else "unknown"
            reason = evaluation.failure.reason if evaluation.failure else "no reason given"
            self._fail(candidate, stage, reason, evaluation=evaluation)
            return
        try:
            values = [float(v) for v in self._parts.judge.values(evaluation)]
            constraints = self._parts.judge.constraints(evaluation)
        except (KeyError, ValueError) as error:
            self._fail(candidate, "score", str(error), evaluation=evaluation)
            return
        for name, value in zip(self._study.objectives, values, strict=True):
            if not math.isfinite(value):
                self._fail(candidate, "score", f"{name} is {value}", evaluation=evaluation)
                return
        self._streak.end()
        candidate.writer.complete(values, evaluation, constraints)
        point = self._point(candidate.number, values)
        self._told(candidate, lambda: describe(point, self._progress.base))

    def _fail(
        self,
        candidate: Candidate,
        stage: str,
        reason: str,
        *,
        evaluation: Evaluation | None = None,
        traceback: str = "",
    ) -> None:
        candidate.writer.fail(stage, reason, evaluation=evaluation, traceback=traceback)
        self._told(candidate, lambda: f"failed in stage {stage}: {reason}", failed=True)
        if candidate.recipe.is_identity:
            raise BaseFailedError(stage, reason, traceback)
        self._streak.add(stage, reason)
        if self._streak.length == IN_A_ROW:
            self._progress.say(
                f"{IN_A_ROW} trials in a row failed like this, so it may not be their recipes. Ctrl-C stops "
                "the search, and the same command goes on once that is mended"
            )

    def _told(self, candidate: Candidate, what: Callable[[], str], failed: bool = False) -> None:
        self._driver.release(candidate.writer.id)
        self._settle_twins(candidate)
        with read_once(self._study.optuna):
            self._show(candidate, what, failed)

    def _show(self, candidate: Candidate, what: Callable[[], str], failed: bool) -> None:
        self._refresh()
        if candidate.writer.lost:
            self._progress.say(
                f"trial {candidate.number}: another driver took it over, its result is dropped"
            )
            return
        self._progress.trial_line(candidate.number, what(), failed=failed)
        if self._parts.after_trial is not None:
            self._parts.after_trial(self._study, candidate.number)

    def _settle_twins(self, candidate: Candidate) -> None:
        original = self._study.optuna._storage.get_trial(candidate.writer.id)
        for twin in self._asker.twins_of.pop(candidate.recipe.key, []):
            if is_candidate(original) or is_stopped(original):
                self._asker.copy(original, twin, counted=False)
            else:
                self._asker.hold(twin)  # it may fare better

    def _return(self, candidate: Candidate) -> None:
        self._driver.release(candidate.writer.id)
        if candidate.writer.give_back():
            self.interrupted_count += 1

    # -- what is shown

    def _show_preparation(self) -> None:
        self._progress.preparing(self._preparation.done, self._preparation.known)

    def _refresh(self) -> None:
        trials = self._trials()
        finished = [t for t in trials if counts(t)]
        failed = sum(t.state == TrialState.FAIL for t in finished)
        self._progress.totals(len(finished), failed, sum(map(is_stopped, finished)))
        points = {t.number: self._point(t.number, t.values) for t in trials if t.state == TrialState.COMPLETE}
        first, direction = next(iter(self._study.objectives.items()))
        front = sorted(
            (points[n] for n in chosen_numbers(self._study)),
            key=lambda point: point.values[first],
            reverse=direction == "maximize",
        )
        base = base_number(self._study)
        self._progress.points(None if base is None else points[base], front)

    def _point(self, number: int, values: Sequence[float]) -> Point:
        """What a trial was told, milliseconds as of the newest reference's machine."""
        point = Point(number, dict(zip(self._study.objectives, values, strict=True)))
        if "latency_ms" in point.values:
            point.values["latency_ms"] *= self._latency_scale
        return point
