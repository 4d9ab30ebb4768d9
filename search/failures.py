"""What failed trials say: which options are to blame, and when it is not the candidates."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from spaces.table import Options

IN_A_ROW = 5
"""So many failures of one kind, with nothing that succeeds in between, may not be the candidates' own."""


def chances(worked: Options, failed: Options, most: int) -> NDArray[np.float64]:
    """Chance `(P, most)` that each option works; 1 for those that were in no failed trial.

    Each failure is shared among the options of its recipe and chance. An option is blamed by the fourth power
    of the share of its own trials that failed: what worked elsewhere is hardly suspected, what never did is
    suspected wholly, and a few failures of the same option leave it with little.

    Args:
        worked: positions `(N, P)` of trials that were evaluated or stopped at a rung.
        failed: the same `(F, P)` of those that failed.
        most: options of a parameter.
    """
    columns = np.arange(worked.shape[1])
    good, bad = (_times(rows, most) for rows in (worked, failed))
    chance = np.ones(bad.shape)
    for row in failed:
        there = columns, row
        blame = np.where(row > 0, (bad[there] / (bad[there] + good[there])) ** 4, 0.0)
        chance[there] *= 1.0 - blame / (1.0 + blame.sum())
    return chance


def _times(rows: Options, most: int) -> NDArray[np.int64]:
    """How often `(P, most)` each option is in recipes `(N, P)`."""
    times: NDArray[np.int64] = (rows[:, :, None] == np.arange(most)).sum(axis=0)
    return times


class Streak:
    """Failures of one kind in a row: same stage, same reason."""

    def __init__(self) -> None:
        self._kind, self.length = ("", ""), 0

    def end(self) -> None:
        """A trial has succeeded."""
        self.length = 0

    def add(self, stage: str, reason: str) -> None:
        """A trial has failed."""
        # Paths, sizes and keys of recipes differ where the cause is one.
        kind = stage, re.sub(r"\S*\d\S*", "#", reason)
        self.length = self.length + 1 if kind == self._kind else 1
        self._kind = kind
