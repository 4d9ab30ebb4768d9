"""Running a search: a study, its parts and a pool of workers, until the study has its trials."""

from __future__ import annotations

import time
from dataclasses import dataclass

from optuna.trial import TrialState

from search.owners import driver_of
from search.parts import SearchParts
from search.progress import Progress
from search.source import StudySource
from search.study import SearchStudy
from search.trials import counts, is_stopped
from search.workers import Pool, StopRequest, WorkerFactory, run_jobs
from spaces.errors import InputError


@dataclass(frozen=True)
class SearchOutcome:
    """What a run came to.

    Attributes:
        finished, failed, stopped_early: trials of the study that count, those among them that failed, and
            those that were stopped at a rung.
        interrupted: trials that this run returned to be done again (its own or a dead driver's).
        stopped: True where Ctrl-C or SIGTERM ended the run before the study had its trials.
        seconds: wall-clock of this run.
    """

    finished: int
    failed: int
    interrupted: int
    stopped: bool
    seconds: float
    stopped_early: int = 0


def run_search(
    study: SearchStudy,
    parts: SearchParts,
    factory: WorkerFactory,
    *,
    trials: int,
    pool: Pool | None = None,
    progress: Progress | None = None,
    stop: StopRequest | None = None,
) -> SearchOutcome:
    """Search until `trials` trials of the study are finished, whoever has run them.

    Failed candidates count, interrupted trials do not. Several calls may work on one study at the same
    time, on one machine or many; together they may overshoot the total by one trial per driver.

    Args:
        factory: see `search.workers.WorkerFactory`.
        progress: where to show what happens; a context manager that is entered here.

    Raises:
        InputError: `trials` below 1, or raised by the factory in a worker.
        BaseFailedError: the base model itself failed.
        WorkersUnusableError: workers cannot be started.
    """
    if trials < 1:
        raise InputError("trials", trials, "must be at least 1")
    began = time.monotonic()
    with driver_of(study.optuna) as driver, progress or Progress(trials, quiet=True) as shown:
        source = StudySource(study, parts, driver, trials, shown)
        try:
            source.recover()
            ended = source.is_finished() or run_jobs(source, factory, pool or Pool(), stop)
        finally:
            source.close()
    finished = [trial for trial in study.optuna.get_trials(deepcopy=False) if counts(trial)]
    return SearchOutcome(
        finished=len(finished),
        failed=sum(trial.state == TrialState.FAIL for trial in finished),
        interrupted=source.interrupted_count,
        stopped=not ended,
        seconds=time.monotonic() - began,
        stopped_early=sum(map(is_stopped, finished)),
    )
