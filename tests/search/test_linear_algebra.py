"""BLAS keeps to one thread while the search thinks, and has its own number back afterwards."""

from __future__ import annotations

from threadpoolctl import threadpool_info, threadpool_limits

from evaluators.latency_model import LatencyModel, fit_latency
from evaluators.ranking import Problem
from search.knowledge import Finished
from search.linear_algebra import on_one_thread
from search.sampler import FrontSampler
from tests.search.test_sampler import MadeUp


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_one_thread_while_entered_and_as_many_as_before_afterwards() -> None:
    with threadpool_limits(2, user_api="blas"):
        with on_one_thread():
            assert blas_threads() == {1}
        assert blas_threads() == {2}


def test_proposals_are_made_on_one_thread() -> None:
    problem = MadeUp()
    seen: list[set[int]] = []

    def relearn(finished: Finished) -> LatencyModel:
        seen.append(blas_threads())
        return fit_latency(problem.table, finished.options, finished.ratio)

    with threadpool_limits(2, user_api="blas"):
        problem.run(FrontSampler(problem.table, problem.damage, relearn, Problem(), 0), 3)
        assert blas_threads() == {2}
    assert seen
    assert all(threads == {1} for threads in seen)
