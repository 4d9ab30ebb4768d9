"""What all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small networks gain nothing from more, and on a busy machine threads that wait for each other stall."""
    torch.set_num_threads(1)
