"""Opening the database of a study: SQLite by default, any server that SQLAlchemy reaches."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError

from search.bulk_storage import BulkStorage
from spaces.errors import InputError

DEFAULT_URL = "sqlite:///runs/paredown.db"

HEARTBEAT_SECONDS = 30
GRACE_SECONDS = 150
"""A trial of another host whose heartbeat is older than this is an orphan (by the database's clock)."""

_LOCK_SECONDS = 60
_USERINFO = re.compile(r"(://[^:/@\s]*):\S*@")
_SECRET_QUERY = re.compile(r"((?:password|passwd|pwd|sslpassword|passfile)=)[^&\s'\"]+", re.IGNORECASE)
_NETWORK_FILE_SYSTEMS = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "lustre",
    "beegfs",
    "ceph",
    "fuse.sshfs",
    "9p",
}


def mask_url(text: str) -> str:
    """`text` (a storage URL, or any message with one inside) with every password replaced by `***`.

    >>> mask_url("postgresql://me:secret@host/db")
    'postgresql://me:***@host/db'
    """
    return _SECRET_QUERY.sub(r"\1***", _USERINFO.sub(r"\1:***@", text))


def open_storage(url: str, *, create: bool = True) -> RDBStorage:
    """Connect to `url`, making the SQLite file and the tables where they are missing.

    Args:
        url: a SQLAlchemy URL such as `sqlite:///runs/paredown.db` or `postgresql://user:pw@host/db`.
        create: False refuses a SQLite file that does not exist instead of making an empty one.

    Raises:
        InputError: no such database, no rights, no driver, not a database; passwords are masked.
    """
    parsed = _parse(url)
    options: dict[str, Any] = {"pool_pre_ping": True}
    if parsed.get_backend_name() == "sqlite":
        _prepare_file(parsed, create)
        options = {"connect_args": {"timeout": _LOCK_SECONDS}}
    try:
        storage = _connect(_with_installed_driver(parsed), options)
    except ImportError as error:
        remedy = f"the database driver is missing ({error}); for PostgreSQL: pip install -e '.[postgres]'"
        raise InputError("storage", mask_url(url), remedy) from None
    except (SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:
        reason = _without_password(str(error).splitlines()[0], parsed)
        raise InputError("storage", mask_url(url), f"cannot be used: {reason}") from None
    if parsed.get_backend_name() == "sqlite":
        _serialise_sqlite(storage, wal=not _on_network(Path(str(parsed.database))))
    return storage


def params_at_once(study: optuna.Study) -> AbstractContextManager[None]:
    """Parameters that are set inside are written together at the end, in a study of `open_storage`."""
    backend = getattr(study._storage, "_backend", None)
    return backend.params_gathered() if isinstance(backend, BulkStorage) else nullcontext()


def ask(study: optuna.Study, distributions: Mapping[str, BaseDistribution]) -> optuna.Trial:
    """`study.ask`, its parameters written together; the heartbeat is for `search.owners.Driver` to keep."""
    with warnings.catch_warnings(), params_at_once(study):
        warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed")
        return study.ask(dict(distributions))


def record_heartbeats(study: optuna.Study, trial_ids: list[int]) -> None:
    """Heartbeats of trials that have had their first one; together, in a study of `open_storage`."""
    backend = getattr(study._storage, "_backend", None)
    if isinstance(backend, BulkStorage):
        backend.record_heartbeats(trial_ids)
        return
    for trial_id in trial_ids:
        study._storage.record_heartbeat(trial_id)  # type: ignore[attr-defined]  # any database has it


def read_once(study: optuna.Study) -> AbstractContextManager[None]:
    """Inside, the trials of a study of `open_storage` are read from the database once."""
    backend = getattr(study._storage, "_backend", None)
    return backend.read_once() if isinstance(backend, BulkStorage) else nullcontext()


def _parse(url: str) -> URL:
    try:
        return sqlalchemy.engine.make_url(url)
    except (ArgumentError, ValueError):
        raise InputError(
            "storage", mask_url(url), "not a database URL; write e.g. sqlite:///runs/paredown.db"
        ) from None


def _with_installed_driver(url: URL) -> str:
    """SQLAlchemy 2.1 reads `postgresql://` as psycopg 3, older ones as psycopg2: take what is there."""
    if url.drivername == "postgresql" and find_spec("psycopg") is None:
        url = url.set(drivername="postgresql+psycopg2")
    return url.render_as_string(hide_password=False)


def _prepare_file(url: URL, create: bool) -> None:
    if url.database in (None, "", ":memory:"):
        raise InputError("storage", str(url), "a study in memory cannot be resumed; name a file")
    path = Path(str(url.database))
    if not create and not path.is_file():
        raise InputError("storage", str(path), "no such file; go to where the search ran, or name --storage")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("storage", str(path), f"the folder cannot be made: {error.strerror}") from None


def _connect(url: str, options: dict[str, Any]) -> BulkStorage:
    attempts = 5
    for attempt in range(attempts):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return BulkStorage(
                    url,
                    engine_kwargs=options,
                    heartbeat_interval=HEARTBEAT_SECONDS,
                    grace_period=GRACE_SECONDS,
                )
        except (IntegrityError, OperationalError, ProgrammingError) as error:
            # Two drivers that make the tables of one database at the same moment: one of them loses.
            raced = "exists" in str(error).lower() or "locked" in str(error).lower()
            if not raced and not isinstance(error, IntegrityError):
                raise
            if attempt == attempts - 1:
                raise
            time.sleep(0.2 * (attempt + 1))
    raise AssertionError("unreachable")


def _serialise_sqlite(storage: RDBStorage, wal: bool) -> None:
    """Make every transaction take the write lock at its start.

    SQLite has no SELECT ... FOR UPDATE, so with its default transactions two drivers can both read a
    trial as WAITING and both claim it. With write-ahead logging the dashboard reads meanwhile.
    """
    engine = storage.engine

    def on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # sqlite3 must not begin transactions of its own
        if wal:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")

    def on_begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    sqlalchemy.event.listen(engine, "connect", on_connect)
    sqlalchemy.event.listen(engine, "begin", on_begin)
    engine.dispose()  # connections made so far do not know the listeners


def _on_network(path: Path) -> bool:
    """True on a file system where write-ahead logging (shared memory between processes) is unsafe."""
    try:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return False
    target = str(path.resolve())
    best, kind = "", ""
    for line in mounts:
        _, point, name, *_ = line.split()
        if (target == point or target.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, name
    return kind in _NETWORK_FILE_SYSTEMS


def _without_password(message: str, url: URL) -> str:
    message = mask_url(message)
    if url.password:
        for secret in {str(url.password), unquote(str(url.password))}:
            message = message.replace(secret, "***")
    return message
