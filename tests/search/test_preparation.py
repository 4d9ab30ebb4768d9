"""Preparatory jobs that several drivers share: each is had once, also where it fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from evaluators.jobs import Job
from search.owners import driver_of
from search.parts import SearchParts
from search.preparation import Preparation
from search.progress import Progress
from search.source import StudySource
from search.study import SearchStudy
from search.workers import FINISHED
from tests.search.fake_workers import ToyWorker
from tests.search.toy_problem import toy_parts, toy_study


class Three:
    """A planner of three jobs."""

    def __init__(self, study: SearchStudy) -> None:
        self._study = study

    def pending(self) -> list[Job]:
        names = [f"probe {k}/3" for k in (1, 2, 3)]
        return [Job(kind="p", name=name) for name in names if name not in self._study.job_results()]


class Two:
    """Two drivers of one study in this process, and what `on_prepared` was called by."""

    def __init__(self, folder: Path) -> None:
        self.called: list[str] = []
        self.studies = {name: toy_study(folder) for name in "AB"}

    def parts(self, name: str) -> SearchParts:
        many = "abdefghij"  # so that no trial has the recipe of another one and takes over its result
        planner = Three(self.studies[name])
        return toy_parts(many, planner=planner, on_prepared=lambda _: self.prepared(name))

    def prepared(self, name: str) -> None:
        self.called.append(name)


@pytest.fixture(params=["sqlite", "postgres"])
def two(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Preparation, Preparation]]:
    """Of two drivers of one study."""
    url = request.getfixturevalue("postgres") if request.param == "postgres" else None
    a, b = (toy_study(tmp_path, f"two-{tmp_path.name}", url) for _ in range(2))
    with driver_of(a.optuna) as first, driver_of(b.optuna) as second:
        yield Preparation(a, None, first), Preparation(b, None, second)


@pytest.fixture
def sources(tmp_path: Path) -> Iterator[tuple[Two, StudySource, StudySource]]:
    two = Two(tmp_path)
    with driver_of(two.studies["A"].optuna) as a, driver_of(two.studies["B"].optuna) as b:
        first, second = (
            StudySource(two.studies[name], two.parts(name), driver, 10, Progress(10, quiet=True))
            for name, driver in (("A", a), ("B", b))
        )
        yield two, first, second


def claims_of(preparation: Preparation, barrier: threading.Barrier, names: list[str]) -> list[str]:
    """The names that it could claim, each at the same moment as others try to."""
    claimed = []
    for name in names:
        barrier.wait()
        if preparation.claim(name):
            claimed.append(name)
    return claimed


def test_of_drivers_that_claim_a_job_at_once_one_has_it(two: tuple[Preparation, Preparation]) -> None:
    names, barrier = [f"job {k}" for k in range(60)], threading.Barrier(2)
    with ThreadPoolExecutor(2) as threads:
        claimed = [threads.submit(claims_of, one, barrier, names) for one in two]
        assert sorted([*claimed[0].result(), *claimed[1].result()]) == sorted(names)


def test_a_job_that_is_given_back_is_anyones(two: tuple[Preparation, Preparation]) -> None:
    first, second = two
    job = Job(kind="p", name="job")
    assert first.claim("job")
    assert first.claim("job"), "it is its own"
    assert not second.claim("job")
    second.give_back(job)
    assert not second.claim("job"), "what another one has is not its to give back"
    first.give_back(job)
    assert second.claim("job")


def asked(source: StudySource) -> Job | None:
    """The next job, without the pause after there was none."""
    source._idle_until = 0.0
    job = source.next_job()
    assert job is not FINISHED
    return job  # type: ignore[return-value]


def prepare(source: StudySource, failing: str = "") -> None:
    """Base and the three jobs, one after another."""
    for _ in range(4):
        job = asked(source)
        assert job is not None
        source.started(job, 0)
        if job.name == failing:
            source.failed(job, "measure", "boom", "")
        else:
            source.done(job, list(ToyWorker().run(job))[-1].result or {})


def test_a_job_that_failed_in_one_driver_does_not_hold_up_another(
    sources: tuple[Two, StudySource, StudySource],
) -> None:
    _, first, second = sources
    prepare(first, failing="probe 2/3")
    names = [job.name if (job := asked(second)) else None for _ in range(2)]
    assert names == ["trial 1", "trial 2"]


def test_seeds_are_made_by_one_driver_while_another_asks(
    sources: tuple[Two, StudySource, StudySource],
) -> None:
    two, first, second = sources
    prepare(first)
    meanwhile: list[Job | None] = []
    before = two.prepared

    def slowly(name: str) -> None:
        before(name)
        meanwhile.append(asked(second))

    two.prepared = slowly  # type: ignore[method-assign]
    assert asked(first) is not None
    assert (two.called, meanwhile) == (["A"], [None])
    assert asked(second) is not None
    assert two.called == ["A"]
