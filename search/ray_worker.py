"""The process of a worker: a Ray Tune trainable whose every step is one stage of the job at hand."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from ray import cloudpickle, tune

from evaluators.jobs import HANDED_ON, Job, StageReport, Worker
from search.processes import process_started
from search.ray_measuring import measured_elsewhere
from search.workers import Pool, WorkerFactory, one_line
from spaces.errors import InputError

EVENT = "event"
_TRACEBACK_CHARACTERS = 4000


class WorkerProcess(tune.Trainable):
    """Builds the `Worker` once; Ray resets it with the next job instead of starting a new process.

    Every result holds one JSON text under EVENT, an object with "kind":
    "accepted" (host, pid, started), "stage" (report), "done" (report), "failed" (stage, reason,
    traceback), "unusable" (the factory raised: reason, input_error). The first step of a job does no
    work, so that the driver knows that a worker has it before anything can go wrong.
    """

    def setup(  # type: ignore[override]  # tune.with_parameters hands in the rest
        self,
        config: dict[str, Any],
        pickled_factory: bytes,
        path: list[str],
        pool: Pool,
        measuring: Sequence[Any] = (),
    ) -> None:
        self._pool, self._measuring = pool, measuring
        self._cores = allowed_cores()
        self._worker: Worker | None = None
        self._unusable: dict[str, Any] = {}
        # Ray hands on the folder of the driver's script only; the factory may come from elsewhere.
        sys.path.extend(folder for folder in path if folder not in sys.path)
        try:
            factory: WorkerFactory = cloudpickle.loads(pickled_factory)
            self._worker = factory()
        except InputError as error:
            shown = [error.field, None if error.value is None else str(error.value), error.remedy]
            self._unusable = {"reason": str(error), "input_error": shown}
        except Exception as error:
            self._unusable = {"reason": one_line(error), "input_error": None}
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._take(new_config)
        return True

    def _take(self, config: dict[str, Any]) -> None:
        self._job = Job.model_validate_json(config["job"])
        self._steps: Iterator[StageReport] | None = None
        self._doing = "start"
        self._slot = config["slot"]
        if self._pool.pin_cores:
            pin_to_cores(self._cores, config["slot"], self._pool.threads)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(self._pool.threads)

    def step(self) -> dict[str, Any]:
        try:
            event = self._next_event()
            text = json.dumps(event)
        except Exception as error:
            trace = traceback.format_exc()[-_TRACEBACK_CHARACTERS:]
            event = {"kind": "failed", "stage": self._doing, "reason": one_line(error), "traceback": trace}
            text = json.dumps(event)
        over = event["kind"] in ("done", "failed", "unusable")
        if over:
            self._steps = None  # frees what the job held before the next one begins
        return {EVENT: text, "done": over}

    def _next_event(self) -> dict[str, Any]:
        if self._worker is None:
            return {"kind": "unusable", **self._unusable}
        if self._steps is None:
            self._steps = iter(self._worker.run(self._job))
            pid = os.getpid()
            host, started = socket.gethostname(), process_started(pid)
            return {"kind": "accepted", "host": host, "pid": pid, "started": started}
        report = next(self._steps, None)
        if report is None:
            raise RuntimeError(f"the worker ended a {self._job.kind} job without a result")
        if report.result is not None and HANDED_ON in report.result:
            self._steps = self._elsewhere(report.result[HANDED_ON])
            report = next(self._steps)
        if report.result is None:
            self._doing = report.doing
        return {"kind": "stage" if report.result is None else "done", "report": report.model_dump()}

    def _elsewhere(self, handed: dict[str, Any]) -> Iterator[StageReport]:
        if not self._measuring:
            raise RuntimeError(
                "this machine has another target signature than the study, and no other is there"
            )
        actor = self._measuring[self._slot % len(self._measuring)]
        return measured_elsewhere(self._job, handed, actor)


def allowed_cores() -> list[int]:
    """The cores that this process may use; empty where the system does not say (only Linux does)."""
    return sorted(os.sched_getaffinity(0)) if platform.system() == "Linux" else []


def pin_to_cores(cores: list[int], slot: int, count: int) -> None:
    """Bind every thread of this process to `count` of `cores`, others for each slot, round robin."""
    if not cores:
        return
    own = {cores[(slot * count + i) % len(cores)] for i in range(count)}
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), own)
        except ProcessLookupError:
            continue  # it ended meanwhile
