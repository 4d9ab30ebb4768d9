"""Preparatory jobs: handed out once, their results stored in the study, shared by several drivers."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from evaluators.jobs import Job
from search.handover import replace_claim
from search.owners import Driver, Owner
from search.parts import Planner
from search.study import SearchStudy
from search.trials import JOB_PREFIX

PREPARED = "prepared"
_CLAIM_PREFIX = "paredown:claim/"
_CLAIM_SECONDS = 600
"""A claim of another machine is believed this long."""


class Preparation:
    """The preparatory jobs of a planner, as this driver sees them."""

    def __init__(self, study: SearchStudy, planner: Planner | None, driver: Driver) -> None:
        self._study, self._planner, self._driver = study, planner, driver
        self._queue: deque[Job] = deque()
        self._live: set[str] = set()
        self._failed: set[str] = set()
        self._over = planner is None
        self.done = 0

    @property
    def known(self) -> int:
        """Jobs done, running or waiting, as far as the planner has named them."""
        return self.done + len(self._live) + len(self._queue)

    def next_job(self) -> Job | None:
        """A job that nobody has taken; None where there is none now. `is_over` tells which."""
        if self._over or self._planner is None:
            return None
        if not self._queue and not self._live:
            stored = self._study.job_results()
            pending = [j for j in self._planner.pending() if j.name not in stored]
            self._queue.extend(job for job in pending if not self._has_failed(job.name))
            self._over = not self._queue
        for _ in range(len(self._queue)):
            job = self._queue.popleft()
            if self._stored(job.name) or self._has_failed(job.name):
                continue  # another driver has had it meanwhile
            if self.claim(job.name):
                self._live.add(job.name)
                return job
            self._queue.append(job)
        return None

    @property
    def is_over(self) -> bool:
        return self._over

    def finish(self, job: Job, result: dict[str, Any]) -> None:
        self._end(job)
        self._study.optuna.set_user_attr(JOB_PREFIX + job.name, {"result": result})

    def fail(self, job: Job, stage: str, reason: str) -> None:
        self._end(job)
        self._failed.add(job.name)
        failure = {"failure": {"stage": stage, "reason": reason}}
        self._study.optuna.set_user_attr(JOB_PREFIX + job.name, failure)

    def give_back(self, job: Job) -> None:
        """The job was interrupted: anyone may take it."""
        self._live.discard(job.name)
        self._replace_claim(job.name, None)

    def _end(self, job: Job) -> None:
        self._live.discard(job.name)
        self.done += 1

    def _stored(self, name: str) -> bool:
        return name in self._study.job_results()

    def claim(self, name: str) -> bool:
        """Take what is called so for this driver; False where another one that lives has it."""
        return self._replace_claim(name, {"owner": self._driver.signature, "at": time.time()})

    def _has_failed(self, name: str) -> bool:
        """True for a job that failed in this run: here, or in another driver that lives."""
        if name in self._failed:
            return True
        study = self._study.optuna
        if "failure" not in study.user_attrs.get(JOB_PREFIX + name, {}):
            return False
        claims = study._storage.get_study_system_attrs(study._study_id)
        return self._is_anothers(claims.get(_CLAIM_PREFIX + name))

    def _is_anothers(self, claim: dict[str, Any] | None) -> bool:
        """True for a claim that holds, and is not this driver's."""
        if not claim or claim["owner"] == self._driver.signature:
            return False
        alive = Owner.model_validate(claim["owner"]).is_alive()
        return alive or (alive is None and time.time() - claim["at"] < _CLAIM_SECONDS)

    def _replace_claim(self, name: str, claim: dict[str, Any] | None) -> bool:
        """False where another driver that lives has a claim there."""
        study, key = self._study.optuna, _CLAIM_PREFIX + name
        return replace_claim(
            study._storage, study._study_id, key, claim, lambda before: not self._is_anothers(before)
        )
