"""Samplers compared on a surrogate of recorded recipes: many seeds in minutes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluators.ranking import hypervolume
from search.benchmarks.contenders import CONTENDERS, Contender, Known, known_from
from search.benchmarks.recorded import Recorded
from search.benchmarks.surrogate import Surrogate

CORNER_LOSS = 15.0
"""AP points below the base that bound the hypervolume; the other bound is the base's latency."""

Values = NDArray[np.float64]


def replay(
    contender: Contender, known: Known, surrogate: Surrogate, trials: int, seed: int
) -> tuple[list[NDArray[np.int64]], Values]:
    """Search on the surrogate.

    Returns:
        The recipes in the order in which they were asked for, and the normalised hypervolume `(T,)` after
        each of them, 1 for a front that loses nothing and takes no time.
    """
    searcher = contender.searcher(known, seed)
    asked: list[NDArray[np.int64]] = []
    points, volumes = [], []
    for _ in range(min(trials, contender.affordable or trials)):
        options = known.table.options([searcher.ask()])
        quality, ratio = (float(values[0]) for values in surrogate(options))
        searcher.tell(quality, ratio)
        asked.append(options[0])
        points.append((surrogate.base_map - quality, ratio))
        volumes.append(normalised_volume(points))
    return asked, np.array(volumes)


def normalised_volume(points: Sequence[tuple[float, float]]) -> float:
    """Hypervolume of points (AP lost, latency over the base's); 1 for one that loses and takes nothing."""
    return hypervolume(points, (CORNER_LOSS, 1.0)) / CORNER_LOSS


@dataclass(frozen=True)
class Outcome:
    """Hypervolumes of one contender.

    Attributes:
        volumes: `(S, T)`, a row a seed.
    """

    volumes: Values

    def at(self, trials: int) -> tuple[float, float, float] | None:
        """Median after so many trials with its 95 % interval; None where it did not get there."""
        if trials > self.volumes.shape[1]:
            return None
        return with_interval(self.volumes[:, trials - 1])

    def trials_to(self, volume: float) -> float:
        """Median number of trials until a hypervolume is reached; infinite where half of the seeds do not."""
        reached = self.volumes >= volume
        first = np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, np.inf)
        return float(np.median(first))


def with_interval(values: Values, seed: int = 0) -> tuple[float, float, float]:
    """Median of S values with its 95 % bootstrap interval."""
    random = np.random.default_rng(seed)
    medians = np.median(random.choice(values, size=(2000, len(values))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


def compare(
    recorded: Recorded,
    names: Sequence[str],
    seeds: int,
    trials: int,
    say: Callable[[str], None],
) -> tuple[Surrogate, Mapping[str, Outcome]]:
    """Replay each contender with `seeds` seeds.

    Args:
        names: of `CONTENDERS`.
        say: takes a line at a time.
    """
    table = recorded.table()
    surrogate = Surrogate(recorded, table)
    known = known_from(recorded, table, trials)
    outcomes = {}
    for name in names:
        rows = []
        for seed in range(seeds):
            _, volumes = replay(CONTENDERS[name], known, surrogate, trials, seed)
            rows.append(volumes)
            say(f"{name}: seed {seed + 1}/{seeds}: {volumes[-1]:.4f} after {len(volumes)} trials")
        outcomes[name] = Outcome(np.stack(rows))
    return surrogate, outcomes
