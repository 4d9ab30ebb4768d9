"""Samplers compared on a surrogate of recorded recipes: many seeds in minutes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from joblib import Parallel, delayed
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
    processes: int = 1,
) -> tuple[Surrogate, Mapping[str, Outcome]]:
    """Replay each contender with `seeds` seeds, or as many as it can afford.

    Args:
        names: of `CONTENDERS`.
        say: takes a line at a time.
        processes: that the replays are spread over; what comes out does not depend on it.
    """
    surrogate = Surrogate(recorded, recorded.table())
    known = known_from(recorded, surrogate.table)
    jobs = [(name, seed) for name in names for seed in range(min(seeds, CONTENDERS[name].runs or seeds))]
    volumes: dict[tuple[str, int], Values] = {}
    pool = Parallel(processes, return_as="generator_unordered")
    for name, seed, found in pool(delayed(_replayed)(*job, known, surrogate, trials) for job in jobs):
        volumes[name, seed] = found
        say(f"{len(volumes)}/{len(jobs)}: {name}, seed {seed}: {found[-1]:.4f} after {len(found)} trials")
    rows = {name: [volumes[job] for job in jobs if job[0] == name] for name in names}
    return surrogate, {name: Outcome(np.stack(of_it)) for name, of_it in rows.items()}


def _replayed(
    name: str, seed: int, known: Known, surrogate: Surrogate, trials: int
) -> tuple[str, int, Values]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # in a process of its own
    return name, seed, replay(CONTENDERS[name], known, surrogate, trials, seed)[1]
