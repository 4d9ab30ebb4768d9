"""One local Ray for all tests of this folder that ask for it: it takes seconds to start."""

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
