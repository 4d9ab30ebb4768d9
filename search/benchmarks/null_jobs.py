"""What a job costs in Ray alone: the driver's processor time for jobs that do nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from evaluators.jobs import Job, StageReport
from search.benchmarks.simulation import STAGES
from search.workers import FINISHED, Finished, Pool, run_jobs

JOBS = 60
SETTLED = 10
"""Jobs before those that are measured: Ray and its worker start with them."""


class NullWorker:
    """Reports as many stages as a trial has, all of them over at once."""

    def run(self, job: Job) -> Iterator[StageReport]:
        """Nothing, stage by stage."""
        for stage in range(1, STAGES):
            yield StageReport(stage=f"stage {stage}", next_stage=f"stage {stage + 1}")
        yield StageReport(stage=f"stage {STAGES}", result={})


class _Counting:
    """A `search.workers.JobSource` of a number of jobs."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._given = self.over = 0
        self.cpu: list[float] = []

    def next_job(self) -> Job | Finished | None:
        if self._given == self._count:
            return FINISHED if self.over == self._count else None
        self._given += 1
        return Job(kind="nothing", name=f"nothing {self._given}")

    def started(self, job: Job, worker: int) -> None:
        pass

    def progress(self, job: Job, report: StageReport) -> None:
        pass

    def rung(self, job: Job, report: StageReport) -> bool:
        return False

    def stopped(self, job: Job) -> None:
        pass

    def done(self, job: Job, result: dict[str, Any]) -> None:
        self.over += 1
        self.cpu.append(time.process_time())

    def failed(self, job: Job, stage: str, reason: str, traceback: str) -> None:
        raise RuntimeError(f"a job that does nothing failed: {reason}")

    def interrupted(self, job: Job, stage: str) -> None:
        pass

    def tick(self) -> None:
        pass


def ray_seconds(say: Callable[[str], None], jobs: int = JOBS) -> float:
    """Processor seconds of the driver for one job, stages included, on a worker that is there already."""
    say(f"{jobs} jobs that do nothing")
    source = _Counting(SETTLED + jobs)
    run_jobs(source, NullWorker, Pool(workers=1))
    found = (source.cpu[-1] - source.cpu[SETTLED - 1]) / jobs
    say(f"  {found * 1e3:.1f} ms each")
    return found
