"""What a worker is asked to do, and what it says while it does it: plain data between driver and workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from spaces.recipe import Recipe

HANDED_ON = "handed_on"
"""In the result of a job that a machine cannot end, since latencies are measured on others: what those
must be told. There a trial goes on as a job of kind `measure`, any other job under its own kind."""


def trial_folder(artifacts: Path, number: int) -> Path:
    """Where the files of a trial belong, below the folder of its study; not made here."""
    return artifacts / folder_name(number)


TRIAL_PREFIX = "trial-"


def folder_name(number: int) -> str:
    """Of the folder of a trial."""
    return f"{TRIAL_PREFIX}{number:05d}"


class Job(BaseModel):
    """One piece of work for one worker."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    """ "trial", "damage", "probe", ...: the worker chooses its way by it."""
    name: str
    """Shown in progress, unique within the study: "trial 12", "sensitivity 3/8"."""
    number: int | None = None
    """The Optuna trial number of a job of kind "trial"."""
    recipe: Recipe | None = None
    seed: int = 0
    payload: dict[str, Any] = Field(default_factory=dict)
    """Of a trial: `rungs`, the epochs after which to report a `Rung`."""


class Rung(BaseModel):
    """Figures of a candidate in the middle of its training, by which it may be stopped."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int
    """Passes over fit so far; 0 is one-shot: compressed, norms measured anew, not trained."""
    figures: dict[str, float]
    """ "map" of the exported file on select, and what training no longer changes: size_mb, params, macs."""


class StageReport(BaseModel):
    """A step of a job: the worker yields one after each of its stages."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    """The stage that has just ended: "prune", "finetune 2/4", "export", "score", "latency"."""
    seconds: float = 0.0
    waited: float = 0.0
    """Of these, the seconds for which the worker was suspended for somebody's measurement."""
    next_stage: str = ""
    rung: Rung | None = None
    """Of a trial whose job asked for it: the driver may stop it here."""
    result: dict[str, Any] | None = None
    """Last report only: `Evaluation.model_dump()` for trials, any JSON object for other jobs."""

    @property
    def doing(self) -> str:
        """What the worker does from here on, as progress shows it."""
        return self.next_stage or f"after {self.stage}"


class Worker(Protocol):
    """Built once per worker process by a picklable factory without arguments, then used for many jobs."""

    def run(self, job: Job) -> Iterator[StageReport]:
        """Do `job`, yielding after each stage; the last report carries the result.

        Whatever is raised becomes the job's failure; the worker is used again afterwards.
        """
        ...
