"""Whom failures are blamed on, and when they are not the candidates' own."""

from __future__ import annotations

import numpy as np
import pytest

from search.failures import Streak, chances


def test_chances_by_hand() -> None:
    """Two parameters of three options: the base and (1, 0) worked, (1, 1) failed twice and (2, 0) once."""
    worked = np.array([[0, 0], [1, 0]])
    failed = np.array([[1, 1], [1, 1], [2, 0]])
    once = (2 / 3) ** 4  # option 1 of the first parameter: 2 of its 3 trials failed
    expected = [[1.0, (1 - once / (2 + once)) ** 2, 1 / 2], [1.0, (1 - 1 / (2 + once)) ** 2, 1.0]]
    assert chances(worked, failed, 3) == pytest.approx(np.array(expected))


def test_nobody_is_blamed_for_the_base_nor_without_failures() -> None:
    base = np.zeros((1, 2), np.int64)
    assert (chances(base, base, 3) == 1.0).all()
    assert (chances(base, base[:0], 3) == 1.0).all()


def test_a_streak_is_of_one_kind_and_success_ends_it() -> None:
    streak = Streak()
    for number in range(4):
        streak.add("export", f"OSError: [Errno 28] No space left on device: 'trials/{number:04}/model.onnx'")
    assert streak.length == 4
    streak.add("export", "ValueError: no such operator")
    assert streak.length == 1
    streak.add("train", "ValueError: no such operator")
    assert streak.length == 1
    streak.end()
    streak.add("train", "ValueError: no such operator")
    assert streak.length == 1
