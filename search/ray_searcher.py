"""Ray Tune as our job runner: a searcher that hands out jobs, and one experiment that never retries."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from evaluators.jobs import Job, StageReport
from search.processes import process_started
from search.ray_measuring import end_measuring, measuring_workers
from search.ray_runtime import environment
from search.ray_scheduler import RungScheduler
from search.ray_worker import EVENT, WorkerProcess
from search.workers import FINISHED, JobSource, Pool, StopRequest, WorkerFactory, WorkersUnusableError
from spaces.errors import InputError

_TICK_SECONDS = 1.0
_OFFERS = 3
"""A job whose worker process dies before it has taken it is offered again, this often at most."""

_TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a table even at verbosity 0
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of the user stay what they are
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours ends the workers and returns their trials
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # the study is what we resume from
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}


class _StopRunError(Exception):
    """Leaves Tune's loop. What for is in the searcher."""


@dataclass
class _Live:
    job: Job
    slot: int
    offers: int
    stage: str = "start"
    accepted: bool = False
    host: str = ""
    pid: int = 0
    process_started: str = ""
    actor: Any = None


class JobSearcher(Searcher):
    """Tune asks it for trials; it hands out the jobs of a `JobSource`, one for each free worker.

    Tune would ask one trial ahead, but an Optuna trial must be asked for when it starts, with all the
    results so far. Exceptions of the source are kept in `error` and leave the loop at the next step,
    because Tune would otherwise count them as failures of the trial.
    """

    def __init__(self, source: JobSource, workers: int, request: StopRequest) -> None:
        super().__init__(metric=None, mode=None)
        self._source, self._workers, self._request = source, workers, request
        self.live: dict[str, _Live] = {}
        self.error: BaseException | None = None
        self._again: deque[_Live] = deque()
        self._ticked = 0.0

    def leave_if_asked(self) -> None:
        """Raise where the run should stop, else tick the source once a second."""
        if (
            self.error is None
            and not self._request.is_set
            and time.monotonic() - self._ticked > _TICK_SECONDS
        ):
            self._ticked = time.monotonic()
            self._guarded(self._source.tick)
        if self.error is not None or self._request.is_set:
            end_workers(self.live.values())
            raise _StopRunError

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # FINISHED is a str
        self.leave_if_asked()
        if len(self.live) >= self._workers:
            return None
        live = self._again.popleft() if self._again else self._next()
        if live is None or live == Searcher.FINISHED:
            return live
        assert isinstance(live, _Live)
        self.live[trial_id] = live
        return {"job": live.job.model_dump_json(), "slot": live.slot}

    def _next(self) -> _Live | str | None:
        job: Any = None
        try:
            job = self._source.next_job()
        except BaseException as error:
            self.error = error
            self.leave_if_asked()
        if job is FINISHED:
            return None if self.live else str(Searcher.FINISHED)
        if job is None:
            return None
        taken = {live.slot for live in self.live.values()}
        return _Live(job, next(slot for slot in range(self._workers) if slot not in taken), offers=1)

    def stops(self, trial_id: str, result: dict[str, Any]) -> bool:
        """True where the job has come to a rung and is to be stopped there; the scheduler asks."""
        live, report = self.live[trial_id], _rung_report(result)
        if report is None or self.error is not None:
            return False
        try:
            return self._source.rung(live.job, report)
        except BaseException as error:
            self.error = error
            return False

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        live, event = self.live[trial_id], json.loads(result[EVENT])
        if event["kind"] == "accepted":
            live.accepted, live.host, live.pid = True, event["host"], event["pid"]
            live.process_started = event["started"]
            self._guarded(self._source.started, live.job, live.slot)
        elif event["kind"] == "stage":
            report = StageReport.model_validate(event["report"])
            live.stage = report.doing
            self._guarded(self._source.progress, live.job, report)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if self.error is not None or self._request.is_set:
            return  # stopped, not ended: whoever left the loop accounts for what is still in `live`
        live = self.live.pop(trial_id)
        if error or result is None or EVENT not in result:
            self._process_died(live)
            return
        event = json.loads(result[EVENT])
        if event["kind"] == "done":
            report = StageReport.model_validate(event["report"])
            self._guarded(self._source.progress, live.job, report)
            self._guarded(self._source.done, live.job, report.result)
        elif event["kind"] == "failed":
            reason, trace = event["reason"], event["traceback"]
            self._guarded(self._source.failed, live.job, event["stage"], reason, trace)
        elif event["kind"] == "stage":
            self._guarded(self._source.stopped, live.job)
        elif event["kind"] == "unusable":
            self.live[trial_id] = live
            shown = event["input_error"]
            self.error = (
                InputError(*shown)
                if shown
                else WorkersUnusableError(f"a worker cannot be built: {event['reason']}")
            )

    def _process_died(self, live: _Live) -> None:
        if live.accepted:
            reason = "the worker process died (killed, out of memory, or crashed in native code)"
            self._guarded(self._source.failed, live.job, live.stage, reason, "")
        elif live.offers < _OFFERS:
            self._again.append(_Live(live.job, live.slot, live.offers + 1))
        else:
            self._guarded(self._source.interrupted, live.job, live.stage)
            self.error = WorkersUnusableError(f"{_OFFERS} worker processes in a row died before their job")

    def _guarded(self, call: Callable[..., None], *arguments: Any) -> None:
        if self.error is None:
            try:
                call(*arguments)
            except BaseException as error:
                self.error = error

    def pending_jobs(self) -> list[_Live]:
        """What was under way or waiting for a worker when the run was left."""
        return [*self.live.values(), *self._again]

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is our state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study is our state."""


class _Watch(tune.Callback):
    """Looks at the stop request at every turn of Tune's loop and keeps the actors' handles."""

    def __init__(self, searcher: JobSearcher) -> None:
        self._searcher = searcher

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self._searcher.leave_if_asked()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        live = self._searcher.live.get(trial.trial_id)
        if live is not None:
            live.actor = trial.temporary_state.ray_actor


def run(source: JobSource, factory: WorkerFactory, pool: Pool, request: StopRequest, scratch: Path) -> bool:
    """See `search.workers.run_jobs`; Ray is running, `scratch` is a folder that is removed later."""
    searcher = JobSearcher(source, pool.workers, request)
    pickled: bytes = cloudpickle.dumps(factory)  # type: ignore[no-untyped-call]
    path = [folder for folder in sys.path if os.path.isdir(folder)]
    measuring = measuring_workers(pool, pickled, path)
    trainable = tune.with_parameters(
        WorkerProcess, pickled_factory=pickled, path=path, pool=pool, measuring=measuring
    )
    variables = {**_TUNE_ENVIRONMENT, "TUNE_MAX_PENDING_TRIALS_PG": str(pool.workers)}
    try:
        with environment(variables), _silence():
            tune.run(
                trainable,
                name="jobs",
                search_alg=searcher,
                scheduler=RungScheduler(searcher.stops, pool.workers),
                num_samples=-1,
                reuse_actors=True,
                max_failures=0,
                resources_per_trial={"cpu": pool.cpus_per_worker, "gpu": pool.gpus},
                callbacks=[_Watch(searcher)],
                verbose=0,
                raise_on_failed_trial=False,
                storage_path=str(scratch),
                trial_dirname_creator=lambda trial: trial.trial_id,
            )
    except _StopRunError:
        pass
    except BaseException:
        end_workers(searcher.live.values())
        _return_jobs(source, searcher)
        raise
    finally:
        end_measuring(measuring)
    if searcher.error is None and not request.is_set:
        return True
    _return_jobs(source, searcher)
    if searcher.error is not None:
        raise searcher.error
    return False


def _rung_report(result: dict[str, Any]) -> StageReport | None:
    event = json.loads(result[EVENT])
    report = StageReport.model_validate(event["report"]) if event["kind"] == "stage" else None
    return None if report is None or report.rung is None else report


def _return_jobs(source: JobSource, searcher: JobSearcher) -> None:
    for live in searcher.pending_jobs():
        try:
            source.interrupted(live.job, live.stage)
        except Exception:
            if searcher.error is None:  # the first error is the one worth reading
                raise


def end_workers(workers: Any) -> None:
    """Kill the processes of `workers` (suspended ones, too) so that nothing computes any more."""
    for live in workers:
        if live.pid and live.host == socket.gethostname() and live.process_started:
            with suppress(ProcessLookupError, PermissionError):
                if process_started(live.pid) == live.process_started:
                    os.kill(live.pid, signal.SIGKILL)
        if live.actor is not None:
            with suppress(Exception):  # it is gone, or its node is
                ray.kill(live.actor, no_restart=True)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep Ray's own messages off the terminal: failures reach the user as data of the study."""
    loggers = [logging.getLogger(name) for name in ("ray", "ray.tune", "ray.air", "ray.train")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
