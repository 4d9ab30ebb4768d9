"""Hundreds of workers on a virtual clock: real study, sampler and database, made-up candidates.

What the driver does is done, and takes as long as it takes; what the workers do only moves the clock. The
driver does one thing after another, so whatever arrives while it is busy waits: that wait is what limits the
number of workers that one driver can feed.
"""

from __future__ import annotations

import heapq
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from evaluators.jobs import Job, StageReport
from search.benchmarks.databases import Asked, counted
from search.benchmarks.made_up import MadeUpSearch, evaluation_of
from search.owners import Driver, driver_of
from search.preparation import PREPARED
from search.progress import Progress
from search.source import StudySource
from search.storage import HEARTBEAT_SECONDS
from search.workers import FINISHED

STAGES = 11
"""Of a trial, each of which is written into the study."""
SPREAD = 0.25
"""Standard deviation of the logarithm of a trial's length: cheap recipes take less than dear ones."""
RECOVER_SECONDS = 30.0
ASK, TELL, PROGRESS, HEARTBEAT, RECOVER, RAY = "ask", "tell", "progress", "heartbeats", "orphans", "Ray"


@dataclass
class Cost:
    """What one kind of the driver's work took: calls, seconds, of these in the database, and statements."""

    calls: int = 0
    seconds: float = 0.0
    database_s: float = 0.0
    statements: int = 0


@dataclass(frozen=True)
class Simulated:
    """What came of a simulation, from the end of the first round of trials to the end of the second.

    Attributes:
        workers: their number.
        trials: that ended in this time.
        span_s: virtual seconds.
        busy: share of the workers' time in which they had a trial.
        driver: share of the time in which the driver was busy.
        staleness: of each trial, how many others were told between its ask and its tell.
        costs: by kind of the driver's work.
    """

    workers: int
    trials: int
    span_s: float
    busy: float
    driver: float
    staleness: list[int]
    costs: dict[str, Cost]

    @property
    def trials_per_hour(self) -> float:
        """Throughput."""
        return 3600 * self.trials / self.span_s

    @property
    def driver_s(self) -> float:
        """Driver's seconds for one trial."""
        return sum(cost.seconds for cost in self.costs.values()) / max(self.trials, 1)

    @property
    def first_to_change(self) -> str:
        """The kind of work that takes most of the driver's time."""
        return max(self.costs, key=lambda kind: self.costs[kind].seconds)


@dataclass
class _Worker:
    number: int
    job: Job | None = None
    asked: int = 0
    length: float = 0.0


@dataclass
class _Clock:
    """Virtual time, and the driver's work on it."""

    engine_asked: Asked
    costs: dict[str, Cost] = field(default_factory=lambda: defaultdict(Cost))
    free_at: float = 0.0
    counting: bool = False

    def charge(self, at: float, kind: str, work: Callable[[], object]) -> object:
        """Do some of the driver's work that is due at a time; `free_at` is when it is done."""
        statements, seconds, began = (
            self.engine_asked.statements,
            self.engine_asked.seconds,
            time.perf_counter(),
        )
        result = work()
        took = time.perf_counter() - began
        self.free_at = max(self.free_at, at) + took
        if self.counting:
            cost = self.costs[kind]
            cost.calls += 1
            cost.seconds += took
            cost.database_s += self.engine_asked.seconds - seconds
            cost.statements += self.engine_asked.statements - statements
        return result

    def constant(self, at: float, kind: str, seconds: float) -> None:
        """Work of a known length that is not done here."""
        self.free_at = max(self.free_at, at) + seconds
        if self.counting:
            self.costs[kind].calls += 1
            self.costs[kind].seconds += seconds


def simulate(
    search: MadeUpSearch,
    url: str,
    folder: Path,
    workers: int,
    trial_s: float = 60.0,
    ray_s: float = 0.0,
    say: Callable[[str], None] = lambda _: None,
) -> Simulated:
    """Two rounds of trials on so many workers, the second of which is measured.

    Args:
        search: what is searched.
        url, folder: an empty database, and where files go.
        workers: 2 or more.
        trial_s: mean length of a trial; lengths are drawn from a log-normal distribution.
        ray_s: driver's seconds for one job that Ray takes, as measured with real workers.
        say: takes a line at a time.
    """
    study = search.study(f"simulated-{workers}", url, folder)
    study.optuna.set_user_attr(PREPARED, True)
    total = 3 * workers + 1  # a third round, so that workers ask on while the second one ends
    backend = study.optuna._storage._backend  # type: ignore[attr-defined]
    with driver_of(study.optuna, beating=False) as driver, counted(backend.engine) as asked:
        source = StudySource(study, search.parts(study), driver, total, Progress(total, quiet=True))
        base = source.next_job()
        assert isinstance(base, Job)
        source.started(base, 0)
        assert base.recipe is not None
        source.done(base, evaluation_of(base.recipe).model_dump())
        run = _Run(source, driver, _Clock(asked), workers, trial_s, ray_s, search.seed, say)
        found = run.through()
        source.close()
    return found


class _Run:
    def __init__(
        self,
        source: StudySource,
        driver: Driver,
        clock: _Clock,
        workers: int,
        trial_s: float,
        ray_s: float,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self._source, self._driver, self._clock = source, driver, clock
        self._count, self._trial_s, self._ray_s, self._say = workers, trial_s, ray_s, say
        self._random = np.random.default_rng(seed)
        self._events: list[tuple[float, int, str, _Worker | None]] = []
        self._order = 0
        self._waiting: deque[_Worker] = deque()
        self._told, self._busy_s = 0, 0.0
        self._staleness: list[int] = []
        self._began = self._ended = 0.0
        self._worked: list[tuple[float, float]] = []

    def through(self) -> Simulated:
        for number in range(self._count):
            self._at(0.0, ASK, _Worker(number))
        self._at(HEARTBEAT_SECONDS, HEARTBEAT, None)
        self._at(RECOVER_SECONDS, RECOVER, None)
        while self._told < 2 * self._count:
            at, _, kind, worker = heapq.heappop(self._events)
            if worker is None:
                self._regular(at, kind)
            elif kind == ASK:
                self._ask(at, worker)
            elif kind == PROGRESS:
                self._progress(at, worker)
            else:
                self._tell(at, worker)
        clock, span = self._clock, self._ended - self._began
        inside = sum(max(0.0, min(e, self._ended) - max(b, self._began)) for b, e in self._worked)
        return Simulated(
            self._count,
            len(self._staleness),
            span,
            inside / (span * self._count),
            sum(cost.seconds for cost in clock.costs.values()) / span,
            self._staleness,
            dict(clock.costs),
        )

    def _at(self, at: float, kind: str, worker: _Worker | None) -> None:
        self._order += 1
        heapq.heappush(self._events, (at, self._order, kind, worker))

    def _regular(self, at: float, kind: str) -> None:
        if kind == HEARTBEAT:
            self._clock.charge(at, kind, self._driver.beat)
            self._at(at + HEARTBEAT_SECONDS, kind, None)
        else:
            self._clock.charge(at, kind, self._source.recover)
            self._at(at + RECOVER_SECONDS, kind, None)

    def _ask(self, at: float, worker: _Worker) -> None:
        job = self._clock.charge(at, ASK, self._source.next_job)
        if job is FINISHED:
            return
        if not isinstance(job, Job):
            self._waiting.append(worker)
            return
        self._clock.constant(at, RAY, self._ray_s)
        self._source.started(job, worker.number)
        begin = self._clock.free_at
        length = self._trial_s * float(np.exp(self._random.normal(-0.5 * SPREAD**2, SPREAD)))
        worker.job, worker.asked, worker.length = job, self._told, length
        for stage in range(1, STAGES):
            self._at(begin + length * stage / STAGES, PROGRESS, worker)
        self._at(begin + length, TELL, worker)
        self._worked.append((begin, begin + length))

    def _progress(self, at: float, worker: _Worker) -> None:
        job = worker.job
        assert job is not None
        report = StageReport(stage="training", next_stage=f"training at {at:.0f} s")
        self._clock.charge(at, PROGRESS, lambda: self._source.progress(job, report))

    def _tell(self, at: float, worker: _Worker) -> None:
        job = worker.job
        assert job is not None
        assert job.recipe is not None
        result = evaluation_of(job.recipe).model_dump()
        self._clock.charge(at, TELL, lambda: self._source.done(job, result))
        if self._clock.counting:
            self._staleness.append(self._told - worker.asked)
            self._ended = self._clock.free_at
        self._told += 1
        if self._told == self._count:
            self._clock.counting, self._began = True, self._clock.free_at
        if self._told % 100 == 0:
            self._say(f"  {self._told}/{2 * self._count} trials, {self._clock.free_at:.0f} virtual seconds")
        self._at(self._clock.free_at, ASK, worker)
        while self._waiting:
            self._at(self._clock.free_at, ASK, self._waiting.popleft())
