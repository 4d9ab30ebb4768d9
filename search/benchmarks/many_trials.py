"""A study of thousands of trials: how long it takes to open it, to ask and tell, and to show its front."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial

from evaluators.jobs import Job
from search.benchmarks.made_up import PROBLEM, MadeUpSearch, evaluation_of
from search.front import front_of, subtitle_of, write_pictures
from search.heat_map import heat_map_of
from search.judge import ProblemJudge
from search.owners import driver_of
from search.preparation import PREPARED
from search.progress import Progress
from search.source import StudySource
from search.storage import ask
from search.study import SearchStudy, load_study
from search.trials import TrialWriter

NAME = "many"
SAID_EVERY = 500


@dataclass(frozen=True)
class ManyTrials:
    """Seconds, at a number of finished trials.

    Attributes:
        database: its kind.
        trials, parameters: what the study has.
        open_s, read_s, first_ask_s: resume: opening the study, reading its trials, and until the first
            candidate is handed out.
        ask_s, tell_s: of each further candidate.
        front_s, pictures_s: a study opened anew and its front found; its pictures drawn.
    """

    database: str
    trials: int
    parameters: int
    open_s: float
    read_s: float
    first_ask_s: float
    ask_s: list[float]
    tell_s: list[float]
    front_s: float
    pictures_s: float

    @property
    def resume_s(self) -> float:
        """From nothing to the first candidate."""
        return self.open_s + self.read_s + self.first_ask_s

    @property
    def ask_and_tell_s(self) -> float:
        """Median of one candidate's."""
        return median(a + t for a, t in zip(self.ask_s, self.tell_s, strict=True))


def fill(search: MadeUpSearch, study: SearchStudy, trials: int, say: Callable[[str], None]) -> None:
    """Let a study have the base and random recipes, as a search would have left them."""
    judge, began = ProblemJudge(study, PROBLEM), time.monotonic()
    distributions = search.space.distributions()
    study.optuna.sampler = given = _Given(distributions)
    with driver_of(study.optuna) as driver:
        for k, options in enumerate(_recipes(search, trials)):
            params = search.table.params(options)
            recipe = search.space.recipe(params)
            evaluation = evaluation_of(recipe)
            given.params = params
            writer = TrialWriter(study.optuna, ask(study.optuna, distributions))
            writer.claim(driver.signature, recipe)
            writer.complete(judge.values(evaluation), evaluation, judge.constraints(evaluation))
            search.write_files(study, k)
            if (k + 1) % SAID_EVERY == 0:
                say(f"  {k + 1}/{trials} trials, {time.monotonic() - began:.0f} s")
    study.optuna.set_user_attr(PREPARED, True)


class _Given(RandomSampler):
    """Proposes what it is told to."""

    def __init__(self, distributions: dict[str, BaseDistribution]) -> None:
        super().__init__()
        self._distributions = distributions
        self.params: dict[str, Any] = {}

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._distributions

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.params


def _recipes(search: MadeUpSearch, count: int) -> Iterator[NDArray[np.int64]]:
    """The base, then recipes that go differently far."""
    random, sizes = np.random.default_rng(search.seed), search.table.sizes
    yield np.zeros(len(sizes), np.int64)
    for _ in range(count - 1):
        yield random.binomial(sizes - 1, 0.6 * random.random())


def measure(
    search: MadeUpSearch,
    kind: str,
    url: str,
    folder: Path,
    trials: int,
    asks: int,
    say: Callable[[str], None],
) -> ManyTrials:
    """Fill a study with finished trials, then go on with it as a command started anew does.

    Args:
        kind: of the database, for the report.
        url, folder: an empty database, and where files go.
        trials: finished ones.
        asks: candidates asked for and told, after the first one.
    """
    say(f"{kind}: writing {trials} trials of {len(search.table.names)} parameters")
    fill(search, search.study(NAME, url, folder), trials, say)
    say(f"{kind}: opening them")
    seconds: dict[str, list[float]] = {}

    @contextmanager
    def clocked(what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds.setdefault(what, []).append(time.perf_counter() - began)

    with clocked("open"):
        study = search.study(NAME, url, folder)
    with clocked("read"):
        study.optuna.get_trials(deepcopy=False)
    total = trials + asks + 1
    with driver_of(study.optuna) as driver:
        with clocked("first"):
            parts = search.parts(study)
            source = StudySource(study, parts, driver, total, Progress(total, quiet=True))
            source.recover()
            job = source.next_job()
        for _ in range(asks):
            assert isinstance(job, Job)
            _run(source, job, clocked)
            with clocked("ask"):
                job = source.next_job()
        assert isinstance(job, Job)
        _run(source, job, clocked)
        source.close()
    with clocked("front"):
        again = load_study(NAME, url=url)
        front = front_of(again)
    with clocked("pictures"):
        write_pictures(front, folder / "pictures", NAME, subtitle_of(again), heat_map_of(again))
    return ManyTrials(
        kind,
        trials,
        len(search.table.names),
        open_s=seconds["open"][0],
        read_s=seconds["read"][0],
        first_ask_s=seconds["first"][0],
        ask_s=seconds["ask"],
        tell_s=seconds["tell"][:asks],
        front_s=seconds["front"][0],
        pictures_s=seconds["pictures"][0],
    )


def _run(source: StudySource, job: Job, clocked: Callable[[str], AbstractContextManager[None]]) -> None:
    """Tell what the job would have come to."""
    assert job.recipe is not None
    source.started(job, 0)
    result = evaluation_of(job.recipe).model_dump()
    with clocked("tell"):
        source.done(job, result)
