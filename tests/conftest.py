"""Where tests find each other's helpers: as `tests.search.toy_space`, and those of worker processes by name.

What workers run is pickled by module name, so it must be importable without the `tests` package.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "search"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small networks gain nothing from more, and on a busy machine threads that wait for each other stall."""
    torch.set_num_threads(1)
