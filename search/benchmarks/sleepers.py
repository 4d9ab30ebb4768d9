"""Where workers' time goes: real studies on real workers that sleep, or multiply, instead of training."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from evaluators.jobs import Job, StageReport
from evaluators.quiet import QuietSlot
from evaluators.stage_clock import StageClock
from search.benchmarks.databases import SQLITE, database
from search.benchmarks.made_up import MadeUpSearch, evaluation_of
from search.loop import run_search
from search.trials import evaluation_of as stored_evaluation
from search.trials import is_candidate
from search.workers import Pool

TRAINING, EVALUATING, MEASURING = "training", "evaluating", "measuring"
PREPARING, SUSPENDED = "preparing", "suspended"
USEFUL = (TRAINING, EVALUATING, MEASURING, PREPARING, SUSPENDED)
"""Kinds of time that a study is made of; preparing is evaluating single choices and timing probes."""
STAGES = (
    (TRAINING, 8, 0.91),
    (EVALUATING, 2, 0.06),
    (MEASURING, 1, 0.03),
)
"""Kind, number of stages, share of a trial: as in a study of YOLOX-nano on 100 images."""
STEPS = 100
"""Training steps of a trial: a step that runs is what a measurement waits for."""
PREPARATORY = 8
SIDE = 192


@dataclass(frozen=True)
class Work:
    """What a worker does instead of training.

    Attributes:
        trial_s: seconds of a trial that nobody suspends.
        products_per_s: products of matrices that an idle core does in a second; 0 sleeps.
    """

    trial_s: float
    products_per_s: float = 0.0

    def do(self, seconds: float) -> None:
        """A step: sleep that long, or multiply as much as an idle core does in that time."""
        if not self.products_per_s:
            time.sleep(seconds)
            return
        _multiply(max(1, round(seconds * self.products_per_s)))


def busy(trial_s: float, calibration_s: float = 2.0) -> Work:
    """Work that keeps a core busy, calibrated on this core now."""
    _multiply(10)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < calibration_s:
        _multiply(10)
        done += 10
    return Work(trial_s, done / (time.perf_counter() - began))


def _multiply(times: int) -> None:
    matrix = np.full((SIDE, SIDE), 0.5, np.float32)
    for _ in range(times):
        matrix @ matrix


class SleepingWorker:
    """Takes as long as a candidate, in the same stages, under the same quiet slot.

    Args:
        work: how long, and what for.
        slot: directory of the quiet slot, a private one: the machine's own measurements are not its concern.
    """

    def __init__(self, work: Work, slot: Path) -> None:
        self._work, self._slot = work, QuietSlot(slot)

    def run(self, job: Job) -> Iterator[StageReport]:
        """The stages of a trial; a preparatory job is one short stage."""
        began, clock = time.monotonic(), StageClock(self._slot)
        if job.recipe is None:
            self._compute(self._work.trial_s / 30)
            clock.ended(PREPARING, "")
            yield StageReport(stage="done", result={"seconds": clock.seconds, "span": _span(began)})
            return
        kinds = [(kind, share / count) for kind, count, share in STAGES for _ in range(count)]
        for k, (kind, share) in enumerate(kinds):
            seconds = share * self._work.trial_s
            if kind == MEASURING:
                with self._slot.quiet():
                    self._work.do(seconds)
            else:
                self._compute(seconds)
            coming = kinds[k + 1][0] if k + 1 < len(kinds) else ""
            yield clock.ended(f"{kind} {k + 1}", coming)
        result = evaluation_of(job.recipe, clock.seconds, span=_span(began)).model_dump()
        yield StageReport(stage="done", result=result)

    def _compute(self, seconds: float) -> None:
        step = self._work.trial_s / STEPS
        while seconds > 1e-9:
            with self._slot.computing():
                self._work.do(min(step, seconds))
            seconds -= step


def _span(began: float) -> dict[str, float]:
    return {"pid": os.getpid(), "began": began, "ended": time.monotonic()}


@dataclass(frozen=True)
class WorkerTime:
    """Where the time of the workers went, from the end of the base to the end of the last trial.

    Attributes:
        workers: their number.
        trials: that ended in this time.
        span_s: its length.
        seconds: of all workers together, by kind: those of `USEFUL`, "inside a job" (what no stage accounts
            for), "between jobs", and "at the end" (no trial was left).
        driver_cpu_s: processor time of the driver for one trial, Ray's part in its process included.
    """

    workers: int
    trials: int
    span_s: float
    seconds: dict[str, float]
    driver_cpu_s: float

    @property
    def trials_per_hour(self) -> float:
        """Throughput."""
        return 3600 * self.trials / self.span_s

    @property
    def useful(self) -> float:
        """Share of `USEFUL`; what had no trial left does not count."""
        known = sum(self.seconds[kind] for kind in USEFUL)
        return known / (sum(self.seconds.values()) - self.seconds["at the end"])

    @property
    def overhead_s(self) -> float:
        """Seconds of a worker for one trial that are none of these."""
        return (self.seconds["inside a job"] + self.seconds["between jobs"]) / self.trials


def share_at(found: WorkerTime, work: Work, trial_s: float = 60.0) -> float:
    """The useful share at trials of another length: the overhead stays, everything else grows with it."""
    known = found.useful * (sum(found.seconds.values()) - found.seconds["at the end"]) / found.trials
    known *= trial_s / work.trial_s
    return known / (known + found.overhead_s)


def account(
    trials: Sequence[FrozenTrial],
    preparations: Iterable[Mapping[str, Any]],
    workers: int,
    driver_cpu_s: float,
) -> WorkerTime:
    """Add up what the workers wrote down.

    Args:
        trials: of a study of `SleepingWorker`s, the base among them.
        preparations: results of its preparatory jobs. What was done of them beside the base does not count.
        workers: that ran at a time.
        driver_cpu_s: of the whole run.
    """
    evaluations = [stored_evaluation(trial) for trial in trials if is_candidate(trial)]
    done = [(e.details["span"], e.seconds) for e in evaluations if e is not None and "span" in e.details]
    base, *candidates = sorted(done, key=lambda job: job[0]["began"])
    base_end = base[0]["ended"]
    jobs = candidates + [(one["span"], one["seconds"]) for one in preparations]
    jobs = sorted((job for job in jobs if job[0]["ended"] > base_end), key=lambda job: job[0]["began"])
    end = max(span["ended"] for span, _ in candidates)
    seconds = dict.fromkeys((*USEFUL, "inside a job", "between jobs", "at the end"), 0.0)
    last: dict[float, float] = defaultdict(lambda: base_end)
    for span, stages in jobs:
        began = max(span["began"], base_end)
        counted = (span["ended"] - began) / (span["ended"] - span["began"])
        seconds["between jobs"] += began - last[span["pid"]]
        last[span["pid"]] = span["ended"]
        for stage, took in stages.items():
            seconds[stage.split()[0]] += took * counted
        seconds["inside a job"] += span["ended"] - began - sum(stages.values()) * counted
    seconds["at the end"] = sum(end - ended for ended in last.values()) + (workers - len(last)) * (
        end - base_end
    )
    return WorkerTime(workers, len(candidates), end - base_end, seconds, driver_cpu_s / (len(candidates) + 1))


def run_sleepers(
    search: MadeUpSearch, work: Work, workers: int, trials: int, say: Callable[[str], None]
) -> WorkerTime:
    """Run a study of `trials` trials after the base, and account for its workers' time."""
    jobs = [Job(kind="damage", name=f"preparation {k + 1}/{PREPARATORY}") for k in range(PREPARATORY)]
    say(f"{trials} trials of {work.trial_s:g} s on {workers} worker{'s' * (workers > 1)}")
    with database(SQLITE) as (url, folder):
        study = search.study("sleepers", url, folder)
        factory = partial(SleepingWorker, work, folder / "slot")
        before = time.process_time()
        run_search(
            study,
            search.parts(study, jobs),
            factory,
            trials=trials + 1,
            pool=Pool(workers=workers, threads=1),
        )
        cpu = time.process_time() - before
        trials_of = study.optuna.get_trials(deepcopy=False)
        return account(trials_of, study.job_results().values(), workers, cpu)
