"""Taking a trial from a driver that is gone or gives it back, in one transaction of the database.

Optuna only guards the step from waiting to running. A running trial that goes back to the queue needs the
same care: of two drivers that find one orphan, only one may put it back, and not while a third runs it.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.trial import TrialState

OWNER = "paredown:owner"
"""System attribute: who runs the trial."""

_TRIALS: Any = models.TrialModel.__table__
_SYSTEM: Any = models.TrialSystemAttributeModel.__table__
_USER: Any = models.TrialUserAttributeModel.__table__
_HEARTBEATS: Any = models.TrialHeartbeatModel.__table__


def owner_in(storage: BaseStorage, trial_id: int) -> Any:
    """The owner of a trial as the database has it now; None where nobody has signed it."""
    backend = _database(storage)
    if backend is None:
        return storage.get_trial(trial_id).system_attrs.get(OWNER)
    with backend.engine.connect() as connection:
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
    backend = _database(storage)
    if backend is None:
        raise TypeError("only studies in a database can be handed over")
    with backend.engine.begin() as connection:
        row = _TRIALS.c.trial_id == trial_id
        found = connection.execute(sqlalchemy.select(_TRIALS.c.state).where(row).with_for_update()).scalar()
        if found != TrialState.RUNNING or _owner(connection, trial_id) != owner:
            return False
        _put(connection, _USER, trial_id, user_attrs)
        _put(connection, _SYSTEM, trial_id, system_attrs)
        _remove(connection, _SYSTEM, trial_id, OWNER)
        connection.execute(_HEARTBEATS.delete().where(_HEARTBEATS.c.trial_id == trial_id))
        ended = datetime.datetime.now() if state.is_finished() else None
        connection.execute(_TRIALS.update().where(row).values(state=state, datetime_complete=ended))
    return True


def _owner(connection: sqlalchemy.Connection, trial_id: int) -> Any:
    wanted = (_SYSTEM.c.trial_id == trial_id) & (_SYSTEM.c.key == OWNER)
    text = connection.execute(sqlalchemy.select(_SYSTEM.c.value_json).where(wanted)).scalar()
    return None if text is None else json.loads(text)


def _put(connection: sqlalchemy.Connection, table: Any, trial_id: int, attributes: Mapping[str, Any]) -> None:
    for key, value in attributes.items():
        _remove(connection, table, trial_id, key)
        row = {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
        connection.execute(table.insert().values(row))


def _remove(connection: sqlalchemy.Connection, table: Any, trial_id: int, key: str) -> None:
    connection.execute(table.delete().where((table.c.trial_id == trial_id) & (table.c.key == key)))


def _database(storage: BaseStorage) -> RDBStorage | None:
    backend = getattr(storage, "_backend", storage)  # Optuna puts a cache around it
    return backend if isinstance(backend, RDBStorage) else None
