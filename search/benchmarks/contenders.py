"""Ways to search that are compared on a surrogate of recorded recipes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.samplers import BaseSampler

from evaluators.evaluation import Evaluation, Measurement
from evaluators.ranking import Problem
from search.benchmarks.recorded import Recorded, decoded
from search.knowledge import Finished, LatencyLearner
from search.sampler import FrontSampler
from search.seeds import SEEDS, seed_recipes
from search.strategy import SAMPLERS
from search.trials import TrialWriter
from spaces.errors import InputError
from spaces.recipe import identity
from spaces.table import SpaceTable

MANY_SEEDS = 15
"""A sampler that learns nothing from the damage of single choices may gain by more solved seeds than ours."""
PROBLEM = Problem(limits={"map_drop": ("<=", 7.5)})
"""Half of the range that hypervolumes are taken in, which is 15 AP."""


@dataclass(frozen=True)
class Known:
    """What a search knows when its first candidate is asked for.

    Attributes:
        table: of the space.
        damage: `(P, O)` of single options, measured without training.
        latency: makes the latency model of the probes and the finished trials.
    """

    table: SpaceTable
    damage: NDArray[np.float64]
    latency: LatencyLearner

    def seeds(self, count: int = SEEDS) -> list[NDArray[np.int64]]:
        """The recipes that a seeded study begins with after its base, `count` of them solved for."""
        base = np.zeros((1, len(self.table.names)), np.int64)
        nothing = Finished(base, np.zeros(1), np.ones(1))
        return seed_recipes(self.table, self.damage, self.latency(nothing), count)


def known_from(recorded: Recorded, table: SpaceTable) -> Known:
    """What the recorded studies measured before their first candidate."""
    probes = decoded(recorded.probes).reshape(-1, len(table.names))
    learner = LatencyLearner(table, probes, np.array(recorded.probe_ratio))
    return Known(table, recorded.damages, learner)


class Searcher(Protocol):
    """A search that is asked for parameters and told what came of them, in turn."""

    def ask(self) -> dict[str, Any]:
        """Parameters of the next trial."""

    def tell(self, quality: float, ratio: float) -> None:
        """AP in 0..100, and latency over the base's, of what was asked for last."""


class OptunaStudy:
    """A study as ours are, with any sampler; the base comes first, then so many of our seeds, if any."""

    def __init__(self, known: Known, sampler: BaseSampler, seeds: int) -> None:
        self._space = known.table.space
        self._study = optuna.create_study(
            directions=["maximize", "minimize"], sampler=sampler, study_name="replay"
        )
        self._study.enqueue_trial(self._space.identity_params())
        for options in known.seeds(seeds) if seeds else []:
            self._study.enqueue_trial(known.table.params(options))
        self._key = identity(self._space.detector).key  # needs no recipes: positions say it all
        self._trial: optuna.Trial

    def ask(self) -> dict[str, Any]:
        """Parameters of the next trial."""
        self._trial = self._study.ask(self._space.distributions())
        return self._trial.params

    def tell(self, quality: float, ratio: float) -> None:
        """What came of them."""
        metrics = {
            "map": Measurement(value=quality, unit="AP, 0..100"),
            "latency_ratio": Measurement(value=ratio, unit="candidate / base"),
        }
        evaluation = Evaluation(recipe_key=self._key, status="ok", metrics=metrics)
        TrialWriter(self._study, self._trial).complete([quality, ratio], evaluation)


class RaySearch:
    """Ray Tune's own `OptunaSearch` for two objectives, as it is by default; the base comes first."""

    def __init__(self, known: Known, seed: int) -> None:
        from ray.tune.search.optuna import OptunaSearch  # not for those who leave it out

        space = known.table.space
        self._search = OptunaSearch(
            space.distributions(),
            metric=["map", "ratio"],
            mode=["max", "min"],
            points_to_evaluate=[space.identity_params()],
            seed=seed,
        )
        self._number = 0

    def ask(self) -> dict[str, Any]:
        """Parameters of the next trial."""
        self._number += 1
        return dict(self._search.suggest(str(self._number)) or {})

    def tell(self, quality: float, ratio: float) -> None:
        """What came of them."""
        self._search.on_trial_complete(str(self._number), {"map": quality, "ratio": ratio})


@dataclass(frozen=True)
class Contender:
    """A way to search.

    Attributes:
        searcher: made from what is known and a seed.
        seeds: so many of our solved seeds begin the study, and every bit-width in all layers.
        affordable: trials after which it gets too slow to go on.
        runs: with so many seeds at most, where one takes minutes.
    """

    searcher: Callable[[Known, int], Searcher]
    seeds: int = 0
    affordable: int | None = None
    runs: int | None = None


def _plain(name: str, seeds: int = 0) -> Contender:
    return Contender(lambda known, seed: OptunaStudy(known, SAMPLERS[name](seed), seeds), seeds)


def _ours(mutations: float | None = None) -> Contender:
    options = {} if mutations is None else {"mutations": mutations}

    def searcher(known: Known, seed: int) -> Searcher:
        sampler = FrontSampler(known.table, known.damage, known.latency, PROBLEM, seed, **options)
        return OptunaStudy(known, sampler, SEEDS)

    return Contender(searcher, SEEDS)


CONTENDERS: dict[str, Contender] = {
    "random": _plain("random"),
    "tpe": _plain("tpe"),
    "nsga2": _plain("nsga2"),
    "gp": replace(_plain("gp"), affordable=50, runs=3),
    "ray OptunaSearch": Contender(RaySearch),
    "random, our seeds": _plain("random", SEEDS),
    "tpe, our seeds": _plain("tpe", SEEDS),
    "tpe, 15 of our seeds": _plain("tpe", MANY_SEEDS),
    "nsga2, our seeds": _plain("nsga2", SEEDS),
    "nsga2, 15 of our seeds": _plain("nsga2", MANY_SEEDS),
    "gp, our seeds": replace(_plain("gp", SEEDS), affordable=50, runs=3),
    "front, solver alone": _ours(mutations=0.0),
    "front": _ours(),
}


def require_contenders(names: Iterable[str]) -> None:
    """Raises InputError for a name that is not compared."""
    for name in names:
        if name not in CONTENDERS:
            raise InputError("--sampler", name, f"choose from {', '.join(CONTENDERS)}")
