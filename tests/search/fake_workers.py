"""Small real workers for the tests: they run in real Ray processes and misbehave on request."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

from evaluators.evaluation import Evaluation, Measurement
from evaluators.jobs import Job, Rung, StageReport
from spaces.errors import InputError
from spaces.recipe import Prune


def score(sparsities: dict[str, float]) -> tuple[float, float]:
    """(map, latency_ms) of a candidate of the toy problem: a line of trade-offs between two sites."""
    a, b = sparsities.get("a", 0.0), sparsities.get("b", 0.0)
    return 80.0 - 30.0 * a - 10.0 * b * b, 10.0 - 5.0 * a - 2.0 * b


class ToyWorker:
    """Evaluates the toy problem in two stages; `payload` of a job, or site "c" of a recipe, breaks it."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.jobs_done = 0

    def run(self, job: Job) -> Iterator[StageReport]:
        self.jobs_done += 1
        sites = {c.site: c.sparsity for c in job.recipe.choices if isinstance(c, Prune)} if job.recipe else {}
        trouble = job.payload.get("trouble") or {0.25: "raise", 0.5: "kill", 0.75: "nan"}.get(
            sites.get("c", 0.0)
        )
        yield StageReport(stage="prune", seconds=0.0, next_stage="finetune")
        time.sleep(job.payload.get("seconds", self.seconds))
        if trouble == "raise":
            raise ValueError("loss is not finite\nsecond line")
        if trouble == "exit":
            os._exit(3)
        if trouble == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if trouble == "no result":
            return
        yield StageReport(stage="finetune", next_stage="score")
        yield StageReport(stage="score", result=self._result(job, sites, trouble))

    def _result(self, job: Job, sites: dict[str, float], trouble: str | None) -> dict[str, Any]:
        if job.recipe is None:
            return {
                "pid": os.getpid(),
                "jobs_done": self.jobs_done,
                "threads": os.environ.get("OMP_NUM_THREADS"),
                "cores": sorted(os.sched_getaffinity(0)),
                "nan": float("nan"),
            }
        accuracy, latency = score(sites)
        accuracy = float("nan") if trouble == "nan" else accuracy
        return Evaluation(
            recipe_key=job.recipe.key,
            status="ok",
            metrics={
                "map": Measurement(value=accuracy, unit="AP"),
                "latency_ms": Measurement(value=latency, unit="ms"),
            },
        ).model_dump()


class SlowWorker(ToyWorker):
    def __init__(self) -> None:
        super().__init__(seconds=0.4)


class EndlessWorker(ToyWorker):
    """Its first stage never ends by itself."""

    def __init__(self) -> None:
        super().__init__(seconds=3600.0)


def refused() -> ToyWorker:
    raise InputError("checkpoint", "x.pth", "no such file")


def broken() -> ToyWorker:
    raise RuntimeError("no engine here")


def dying() -> ToyWorker:
    os._exit(1)


class RungWorker(ToyWorker):
    """Trains the toy candidate for two epochs; before that 20 points of mAP a unit of "a" are missing."""

    def run(self, job: Job) -> Iterator[StageReport]:
        assert job.recipe is not None
        sites = {c.site: c.sparsity for c in job.recipe.choices if isinstance(c, Prune)}
        final, _ = score(sites)
        for epochs in job.payload["rungs"] if any(sites.values()) else []:
            missing = (20.0 - 10.0 * epochs) * sites.get("a", 0.0)
            rung = Rung(epochs=epochs, figures={"map": final - missing, "size_mb": 1.0})
            yield StageReport(stage=f"rung {epochs}", next_stage="finetune", rung=rung)
        yield from super().run(job)
