"""Who runs a trial: which driver process on which machine, and whether it is still alive."""

from __future__ import annotations

import datetime
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from pydantic import BaseModel, ConfigDict, ValidationError

from search.processes import process_started
from search.storage import GRACE_SECONDS, HEARTBEAT_SECONDS, record_heartbeats
from search.trials import doing, give_back, owner_of

_DRIVER_PREFIX = "paredown:driver/"
_live_here: set[str] = set()  # drivers of this very process


class Owner(BaseModel):
    """A driver process. Process ids are reused, so the start time of the process belongs to it."""

    model_config = ConfigDict(frozen=True)

    host: str
    boot: str
    pid_namespace: str
    pid: int
    started: str
    driver: str

    def is_alive(self) -> bool | None:
        """True or False where this process can tell, None where it cannot (another machine or container)."""
        here = _here(self.driver)
        if self.host != here.host:
            return None
        if self.boot != here.boot:
            return False  # this machine was started anew since
        if self.pid_namespace != here.pid_namespace:
            return None
        if process_started(self.pid) != self.started:
            return False
        return self.pid != here.pid or self.driver in _live_here


@dataclass
class Driver:
    """This driver: it signs its trials and keeps their heartbeats going."""

    study: optuna.Study
    owner: Owner
    _trials: set[int] = field(default_factory=set)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    @property
    def signature(self) -> dict[str, Any]:
        return self.owner.model_dump()

    def hold(self, trial_id: int) -> None:
        """Begin the heartbeat of a trial (`ask` gives it none)."""
        with self._guard:
            self._trials.add(trial_id)
        _storage(self.study).record_heartbeat(trial_id)

    def release(self, trial_id: int) -> None:
        with self._guard:
            self._trials.discard(trial_id)

    def beat(self) -> None:
        with self._guard:
            held = list(self._trials)
        record_heartbeats(self.study, held)


@contextmanager
def driver_of(study: optuna.Study, beating: bool = True) -> Iterator[Driver]:
    """Register a driver of `study` and beat for its trials until the block ends.

    Args:
        study: of ours.
        beating: False leaves `Driver.beat` to the caller.
    """
    driver = Driver(study, _here(uuid.uuid4().hex[:12]))
    key = _DRIVER_PREFIX + driver.owner.driver
    _live_here.add(driver.owner.driver)
    over = threading.Event()

    def keep_beating() -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            # A beat that fails (the server restarts) is made up by the next one.
            try:
                driver.beat()
            except optuna.exceptions.StorageInternalError:
                continue

    thread = threading.Thread(target=keep_beating, name="paredown-heartbeat", daemon=True)
    study._storage.set_study_system_attr(study._study_id, key, driver.signature)
    if beating:
        thread.start()
    try:
        yield driver
    finally:
        over.set()
        if beating:
            thread.join()
        _live_here.discard(driver.owner.driver)
        study._storage.set_study_system_attr(study._study_id, key, None)


def recover_orphans(study: optuna.Study, me: Driver | None = None) -> list[tuple[int, str]]:
    """Put RUNNING trials whose driver is gone back into the queue; see `search.trials.give_back`.

    Args:
        study: any study of ours.
        me: the driver that calls, if it is one.

    Returns:
        (number, stage in which it was interrupted) for each trial that this call recovered.
    """
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    if not running:
        return []
    stale = set(_storage(study)._get_stale_trial_ids(study._study_id))
    others = others_may_live(study, me)
    recovered = []
    for trial in running:
        alive = _alive(owner_of(trial))
        if alive is None and owner_of(trial) is None and not others:
            alive = False  # its driver was killed between creating and signing it
        if alive is None:
            alive = trial._trial_id not in stale and not _unsigned_for_long(trial)
        if not alive and give_back(study, trial, crashed=True):
            recovered.append((trial.number, doing(trial)))
    return recovered


def others_may_live(study: optuna.Study, me: Driver | None) -> bool:
    """True unless every other driver that registered with the study has ended or is known to be dead."""
    mine = _DRIVER_PREFIX + me.owner.driver if me else None
    attributes = study._storage.get_study_system_attrs(study._study_id)
    return any(
        key.startswith(_DRIVER_PREFIX) and key != mine and owner and _alive(owner) is not False
        for key, owner in attributes.items()
    )


def _alive(owner: dict[str, Any] | None) -> bool | None:
    try:
        return Owner.model_validate(owner).is_alive()
    except ValidationError:
        return None


def _unsigned_for_long(trial: optuna.trial.FrozenTrial) -> bool:
    if owner_of(trial) is not None or trial.datetime_start is None:
        return False
    return (datetime.datetime.now() - trial.datetime_start).total_seconds() > GRACE_SECONDS


def _here(driver: str) -> Owner:
    return Owner(
        host=socket.gethostname(),
        boot=_read("/proc/sys/kernel/random/boot_id"),
        pid_namespace=_link("/proc/self/ns/pid"),
        pid=os.getpid(),
        started=process_started(os.getpid()) or "",
        driver=driver,
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _storage(study: optuna.Study) -> RDBStorage:
    return study._storage  # type: ignore[return-value]  # Optuna's cache around ours, same methods
