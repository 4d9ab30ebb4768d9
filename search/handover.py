"""What only one driver may have, taken or given back in one transaction of the database.

Optuna only guards the step from waiting to running. A running trial that goes back to the queue needs the
same care: of two drivers that find one orphan, only one may put it back, and not while a third runs it.
So do the claims of preparatory jobs, which are attributes of the study.

A database that does not answer raises Optuna's `StorageInternalError`, here as in Optuna.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

OWNER = "paredown:owner"
"""System attribute: who runs the trial."""

_TRIALS: Any = models.TrialModel.__table__
_SYSTEM: Any = models.TrialSystemAttributeModel.__table__
_USER: Any = models.TrialUserAttributeModel.__table__
_HEARTBEATS: Any = models.TrialHeartbeatModel.__table__
_STUDIES: Any = models.StudyModel.__table__
_OF_STUDIES: Any = models.StudySystemAttributeModel.__table__


def owner_in(storage: BaseStorage, trial_id: int) -> Any:
    """The owner of a trial as the database has it now; None where nobody has signed it."""
    backend = _database(storage)
    if backend is None:
        return storage.get_trial(trial_id).system_attrs.get(OWNER)
    with _transaction(backend) as connection:
        return _owner(connection, trial_id)


def hand_over(
    storage: BaseStorage,
    trial_id: int,
    owner: Any,
    state: TrialState,
    user_attrs: Mapping[str, Any],
    system_attrs: Mapping[str, Any],
) -> bool:
    """Take a RUNNING trial from `owner`: back to the queue (WAITING), or ended (FAIL).

    Signature and heartbeat go with it, so that whoever takes it next is not taken for the old owner.

    Args:
        storage: a database; studies in memory have one driver and nothing to hand over.
        trial_id: Optuna's id, not the number.
        owner: who has it as far as the caller knows.
        state: WAITING or FAIL.
        user_attrs, system_attrs: written together with it.

    Returns:
        False where the trial is not running, or runs under another owner: then nothing was changed.
    """
    with _transaction(_shared(storage)) as connection:
        row = _TRIALS.c.trial_id == trial_id
        found = connection.execute(sqlalchemy.select(_TRIALS.c.state).where(row).with_for_update()).scalar()
        if found != TrialState.RUNNING or _owner(connection, trial_id) != owner:
            return False
        for table, attributes in ((_USER, user_attrs), (_SYSTEM, system_attrs)):
            for key, value in attributes.items():
                _put(connection, table, {"trial_id": trial_id, "key": key}, value)
        _remove(connection, _SYSTEM, {"trial_id": trial_id, "key": OWNER})
        connection.execute(_HEARTBEATS.delete().where(_HEARTBEATS.c.trial_id == trial_id))
        ended = datetime.datetime.now() if state.is_finished() else None
        connection.execute(_TRIALS.update().where(row).values(state=state, datetime_complete=ended))
    return True


def replace_claim(
    storage: BaseStorage, study_id: int, key: str, claim: Any, may_replace: Callable[[Any], bool]
) -> bool:
    """Put `claim` into a system attribute of a study.

    Args:
        storage: a database.
        study_id: Optuna's id.
        key: of the attribute.
        claim: JSON; None where nobody shall have it.
        may_replace: is asked about the claim that is there, None where there is none.

    Returns:
        False where it may not be replaced: then nothing was changed.
    """
    place = {"study_id": study_id, "key": key}
    with _transaction(_shared(storage)) as connection:
        study = sqlalchemy.select(_STUDIES.c.study_id).where(_STUDIES.c.study_id == study_id)
        connection.execute(study.with_for_update())  # there is no row of the claim to lock at first
        if not may_replace(_value(connection, _OF_STUDIES, place)):
            return False
        _put(connection, _OF_STUDIES, place, claim)
    return True


def _owner(connection: sqlalchemy.Connection, trial_id: int) -> Any:
    return _value(connection, _SYSTEM, {"trial_id": trial_id, "key": OWNER})


def _value(connection: sqlalchemy.Connection, table: Any, place: Mapping[str, Any]) -> Any:
    wanted = sqlalchemy.select(table.c.value_json).filter_by(**place)
    text = connection.execute(wanted).scalar()
    return None if text is None else json.loads(text)


def _put(connection: sqlalchemy.Connection, table: Any, place: Mapping[str, Any], value: Any) -> None:
    _remove(connection, table, place)
    connection.execute(table.insert().values(**place, value_json=json.dumps(value)))


def _remove(connection: sqlalchemy.Connection, table: Any, place: Mapping[str, Any]) -> None:
    connection.execute(table.delete().where(*(table.c[name] == value for name, value in place.items())))


@contextmanager
def _transaction(backend: RDBStorage) -> Iterator[sqlalchemy.Connection]:
    try:
        with backend.engine.begin() as connection:
            yield connection
    except SQLAlchemyError as error:
        raise StorageInternalError("a transaction failed") from error


def _shared(storage: BaseStorage) -> RDBStorage:
    backend = _database(storage)
    if backend is None:
        raise TypeError("studies in memory have one driver, and nothing to hand over")
    return backend


def _database(storage: BaseStorage) -> RDBStorage | None:
    backend = getattr(storage, "_backend", storage)  # Optuna puts a cache around it
    return backend if isinstance(backend, RDBStorage) else None
