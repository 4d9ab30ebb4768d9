"""What points add to a front, by hand and beside the hypervolume of all points."""

from __future__ import annotations

import numpy as np
import pytest

from evaluators.ranking import hypervolume
from search.improvement import Reached


def test_areas_by_hand() -> None:
    """Reached: .75 from 0 AP on, .5 from 2 AP on; the end is at 6 AP."""
    reached = Reached(np.array([2.0, 0.0]), np.array([0.5, 0.75]), 6.0)
    losses = np.array([1.0, 3.0, -1.0, 0.0, 7.0, np.inf, 2.0])
    ratios = np.array([0.25, 0.5, 0.7, 0.8, 0.1, 0.1, 0.4])
    expected = [
        1 * 0.5 + 4 * 0.25,
        0.0,  # as fast as what loses less
        2 * 0.05,  # a gain of mAP is no loss
        0.0,
        0.0,  # beyond the largest loss
        0.0,
        4 * 0.1,
    ]
    assert reached.added(losses, ratios) == pytest.approx(expected)


def test_the_first_points_of_a_loss_are_free() -> None:
    """Between the base and what loses 0.2 AP at half of its time there is nothing to find."""
    reached = Reached(np.array([0.0, 0.2, 2.5]), np.array([1.0, 0.5, 0.25]), 6.0, free=0.5)
    losses, ratios = np.array([0.0, 0.1, 0.5, 1.5]), np.array([0.6, 0.4, 0.4, 0.4])
    assert reached.added(losses, ratios) == pytest.approx([0.0, 2 * 0.1, 2 * 0.1, 1 * 0.1])


def test_nothing_reached() -> None:
    nothing = Reached(np.zeros(0), np.zeros(0), 6.0)
    assert nothing.added(np.array([0.0, 3.0]), np.array([0.5, 1.2])) == pytest.approx([3.0, 0.0])


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_difference_of_hypervolumes(seed: int) -> None:
    random = np.random.default_rng(seed)
    losses, ratios = random.uniform(-1, 8, 12), random.uniform(0.2, 1.2, 12)
    reached = Reached(losses[:10], ratios[:10], 6.0)
    points = np.stack([np.maximum(losses, 0.0), ratios], axis=1)
    before = hypervolume(points[:10], (6.0, 1.0))
    more = [hypervolume(points[[*range(10), k]], (6.0, 1.0)) - before for k in (10, 11)]
    assert reached.added(losses[10:], ratios[10:]) == pytest.approx(more)
