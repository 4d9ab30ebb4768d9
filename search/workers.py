"""Running jobs on worker processes: what a driver needs to know about it. Ray Tune does it underneath.

Importing this module is cheap; Ray is imported when the first job runs.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import FrameType
from typing import Any, Final, Literal, Protocol, TypeAlias

from evaluators.jobs import Job, StageReport, Worker
from spaces.errors import InputError

WorkerFactory: TypeAlias = Callable[[], Worker]
"""Picklable, without arguments; called once in every worker process."""


ANSWER_S = 10.0
"""A cluster takes a connection within so many seconds."""


class _Finished(Enum):
    FINISHED = "finished"


FINISHED: Final = _Finished.FINISHED
"""What `next_job` returns when no job will ever come again."""
Finished: TypeAlias = Literal[_Finished.FINISHED]


class WorkersUnusableError(RuntimeError):
    """Worker processes die or fail before they take a job, so no candidate is to blame."""


@dataclass(frozen=True)
class Pool:
    """The worker processes.

    Attributes:
        workers: how many run at a time.
        threads: threads of each (set before torch is imported there).
        pin_cores: bind each worker to `threads` cores of its own, round robin.
        cpus, gpus: what Ray reserves for a worker. 0 CPUs means `threads`.
        address: an existing Ray cluster ("auto", "host:port"); None starts Ray here, on loopback only.
        environment: further environment variables of the workers.
        signature: of the target, that latencies are measured under. In a cluster, machines with another one
            hand jobs on to those that have it.
        signature_here: picklable; that of the machine on which it is called. None where all are alike.
    """

    workers: int = 1
    threads: int = 1
    pin_cores: bool = False
    cpus: float = 0.0
    gpus: float = 0.0
    address: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    signature: Mapping[str, Any] | None = None
    signature_here: Callable[[], Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "threads"):
            if getattr(self, name) < 1:
                raise InputError(name, getattr(self, name), "must be at least 1")

    @property
    def cpus_per_worker(self) -> float:
        return self.cpus or float(self.threads)

    @property
    def worker_environment(self) -> dict[str, str]:
        count = str(self.threads)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
        return {**dict.fromkeys(names, count), **self.environment}


def require_cluster(address: str) -> None:
    """Raises InputError where nobody listens at HOST:PORT, which Ray would try for more than a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # `auto`, or a form that Ray alone knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise InputError("address", address, f"no Ray cluster there: {error}") from None


class JobSource(Protocol):
    """Where jobs come from and where their outcomes go. Called in the driver's main thread only."""

    def next_job(self) -> Job | Finished | None:
        """The next job; None where there is nothing to do now; FINISHED where there never will be.

        Called only while a worker is free, several times a second: the job starts at once.
        """
        ...

    def started(self, job: Job, worker: int) -> None:
        """Worker number `worker` (0, 1, ...) has taken the job."""
        ...

    def progress(self, job: Job, report: StageReport) -> None:
        """A stage of the job has ended."""
        ...

    def rung(self, job: Job, report: StageReport) -> bool:
        """The job has come to a rung (`report.rung`). True stops it: `stopped` follows, else `progress`."""
        ...

    def stopped(self, job: Job) -> None:
        """The job was stopped at its rung; its worker is free."""
        ...

    def done(self, job: Job, result: dict[str, Any]) -> None:
        """The job's last report, decoded from JSON (which may hold NaN)."""
        ...

    def failed(self, job: Job, stage: str, reason: str, traceback: str) -> None:
        """The job raised in `stage`, or its process died there (then `traceback` is empty)."""
        ...

    def interrupted(self, job: Job, stage: str) -> None:
        """The run was stopped while the job was in `stage`; its worker has been ended."""
        ...

    def tick(self) -> None:
        """Called about once a second."""
        ...


STUCK_SECONDS = 10.0
"""After a SIGTERM the process ends at the latest. Whoever stops a service or a group of processes ends Ray's
own as well, and what then asks Ray waits for a minute, in native code that nothing can interrupt."""


class StopRequest:
    """Set by the first Ctrl-C (or SIGTERM); the run then ends its workers and returns."""

    def __init__(self) -> None:
        self.is_set = False
        self._leaving: threading.Timer | None = None

    def set(self) -> None:
        self.is_set = True

    def leave_after(self, seconds: float) -> None:
        """End this process then, unless `stay` is called before. The study is as after a kill."""
        self.stay()  # a timer of an earlier signal would outlive the run
        self._leaving = threading.Timer(seconds, _leave)
        self._leaving.daemon = True
        self._leaving.start()

    def stay(self) -> None:
        """The run has ended by itself."""
        if self._leaving is not None:
            self._leaving.cancel()


def _leave() -> None:
    line = "stopped; finished trials are kept, and the same command goes on"
    print(f"paredown: {line}", file=sys.stderr, flush=True)
    os._exit(130)


def run_jobs(source: JobSource, factory: WorkerFactory, pool: Pool, stop: StopRequest | None = None) -> bool:
    """Run the jobs of `source` until it is FINISHED.

    A job that raises or whose process dies is reported to the source and the run goes on. Ray retries
    nothing, keeps nothing on disk and prints nothing; where Ray is not running it is started and ended.

    Returns:
        True where the source was finished, False where the run was stopped (the source has been told
        of every job that was under way).

    Raises:
        InputError: `factory` raised it in a worker.
        WorkersUnusableError: `factory` raised something else, or workers keep dying before their job.
    """
    from search import ray_runtime, ray_searcher

    with (
        stop_on_signals(stop or StopRequest()) as request,
        _staying(request),
        ray_runtime.running_ray(pool) as scratch,
        stop_on_signals(request),  # again: Ray installs handlers of its own when it starts
    ):
        return ray_searcher.run(source, factory, pool, request, scratch)


@contextmanager
def _staying(request: StopRequest) -> Iterator[None]:
    try:
        yield
    finally:
        request.stay()


def one_line(error: BaseException) -> str:
    """Type and first line of the message of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def stop_on_signals(request: StopRequest) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into `request`; the second one acts at once, as without us."""
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may set handlers
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def ask_to_stop(number: int, _frame: FrameType | None) -> None:
        request.set()
        if number == signal.SIGTERM:
            request.leave_after(STUCK_SECONDS)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    for number in signals:
        signal.signal(number, ask_to_stop)
    try:
        yield request
    finally:
        for number in signals:
            signal.signal(number, before[number])
