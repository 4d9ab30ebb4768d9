"""Samplers compared on a surrogate of recorded recipes: many seeds in minutes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.samplers import BaseSampler

from evaluators.evaluation import Evaluation, Measurement
from evaluators.ranking import hypervolume
from search.benchmarks.recorded import Recorded, decoded
from search.benchmarks.surrogate import Surrogate
from search.knowledge import Finished, LatencyLearner
from search.sampler import FrontSampler
from search.seeds import seed_recipes
from search.strategy import SAMPLERS
from search.trials import TrialWriter
from spaces.recipe import identity
from spaces.table import SpaceTable

CORNER_LOSS = 15.0
"""AP points below the base that bound the hypervolume; the other bound is the base's latency."""
LARGEST_LOSS = 7.5
"""As a search with `max_map_drop: 5.0` sets it."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Known:
    """What a search knows when its first candidate is asked for.

    Attributes:
        table: of the space.
        damage: `(P, O)` of single options, measured without training.
        latency: makes the latency model of the probes and the finished trials.
        trials: of the whole study; the seeds take a share of them.
    """

    table: SpaceTable
    damage: Values
    latency: LatencyLearner
    trials: int

    def seeds(self) -> list[NDArray[np.int64]]:
        """The recipes that a seeded study begins with, the base not among them."""
        base = np.zeros((1, len(self.table.names)), np.int64)
        nothing = Finished(base, np.zeros(1), np.ones(1))
        return seed_recipes(self.table, self.damage, self.latency(nothing), self.trials)


def known_from(recorded: Recorded, table: SpaceTable, trials: int) -> Known:
    """What the recorded studies measured before their first candidate."""
    probes = decoded(recorded.probes).reshape(-1, len(table.names))
    learner = LatencyLearner(table, probes, np.array(recorded.probe_ratio))
    return Known(table, recorded.damages, learner, trials)


@dataclass(frozen=True)
class Contender:
    """A way to search.

    Attributes:
        sampler: made from what is known and a seed.
        seeded: begins with our seeds.
        affordable: trials after which it gets too slow to go on.
    """

    sampler: Callable[[Known, int], BaseSampler]
    seeded: bool
    affordable: int | None = None


def _plain(name: str) -> Callable[[Known, int], BaseSampler]:
    return lambda known, seed: SAMPLERS[name](seed)


def _ours(mutations: float | None = None) -> Callable[[Known, int], BaseSampler]:
    options = {} if mutations is None else {"mutations": mutations}
    return lambda known, seed: FrontSampler(
        known.table, known.damage, known.latency, LARGEST_LOSS, seed, **options
    )


CONTENDERS: dict[str, Contender] = {
    "random": Contender(_plain("random"), seeded=False),
    "tpe": Contender(_plain("tpe"), seeded=False),
    "nsga2": Contender(_plain("nsga2"), seeded=False),
    "gp": Contender(_plain("gp"), seeded=False, affordable=50),
    "random, our seeds": Contender(_plain("random"), seeded=True),
    "tpe, our seeds": Contender(_plain("tpe"), seeded=True),
    "nsga2, our seeds": Contender(_plain("nsga2"), seeded=True),
    "front, solver alone": Contender(_ours(mutations=0.0), seeded=True),
    "front": Contender(_ours(), seeded=True),
}


def replay(
    contender: Contender, known: Known, surrogate: Surrogate, trials: int, seed: int
) -> tuple[list[NDArray[np.int64]], Values]:
    """Search on the surrogate.

    Returns:
        The recipes in the order in which they were asked for, and the normalised hypervolume `(T,)` after
        each of them, 1 for a front that loses nothing and takes no time.
    """
    space = known.table.space
    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=contender.sampler(known, seed), study_name="replay"
    )
    study.enqueue_trial(space.identity_params())
    for options in known.seeds() if contender.seeded else []:
        study.enqueue_trial(known.table.params(options))
    key = identity(space.detector).key  # the replay needs no recipes: positions say it all
    asked: list[NDArray[np.int64]] = []
    points, volumes = [], []
    for _ in range(min(trials, contender.affordable or trials)):
        trial = study.ask(space.distributions())
        options = known.table.options([trial.params])
        quality, ratio = (float(values[0]) for values in surrogate(options))
        metrics = {
            "map": Measurement(value=quality, unit="AP, 0..100"),
            "latency_ratio": Measurement(value=ratio, unit="candidate / base"),
        }
        TrialWriter(study, trial).complete(
            [quality, ratio], Evaluation(recipe_key=key, status="ok", metrics=metrics)
        )
        asked.append(options[0])
        points.append((surrogate.base_map - quality, ratio))
        volumes.append(hypervolume(points, (CORNER_LOSS, 1.0)) / CORNER_LOSS)
    return asked, np.array(volumes)


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
