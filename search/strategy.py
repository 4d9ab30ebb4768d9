"""How a study is searched: what is measured first, which seeds follow, which sampler goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler

from evaluators.bench import Bench
from evaluators.jobs import Job
from evaluators.ranking import Problem
from search.knowledge import PROBE, finished_trials, latency_learner, measured_damage
from search.own_sampler import OwnSampler, own_sampler
from search.sampler import FrontSampler
from search.seeds import BFLOAT16_BITS, narrowest, seed_recipes, smooth_starts, uniform_starts
from search.sensitivity import CHUNKS, sensitivity_jobs, sensitivity_of, store_sensitivity
from search.study import SearchStudy
from search.warm_start import warm_seeds
from spaces.errors import InputError
from spaces.methods.topk import PreNmsTopK
from spaces.recipe import Recipe
from spaces.table import SpaceTable

PROBES = 16
DRAWS = 16
"""Random recipes for each probe that is wanted, at most: a small space may have fewer than that."""

SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=False),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed),
    "nsga3": lambda seed: optuna.samplers.NSGAIIISampler(seed=seed),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
"""Optuna's own, by the names of `--sampler`; `front` is ours, those with a colon are users'."""


class Strategy:
    """The plan of one study.

    Args:
        bench: its space and detector.
        study: where results are stored.
        problem: its limits on mAP bound what is proposed.
        sampler: `front`, one of `SAMPLERS`, or `module:Class` or `file.py:Class`, called with `seed`.
        seeds: measure sensitivities and latencies first and enqueue solved recipes; `front` needs it.

    Raises:
        InputError: an unknown sampler.
    """

    def __init__(
        self,
        bench: Bench,
        study: SearchStudy,
        problem: Problem,
        sampler: str = "front",
        seeds: bool = True,
    ) -> None:
        self._study = study
        self._seeds = seeds or sampler == "front"
        self._name = sampler
        self._make = None if sampler == "front" else sampler_named(sampler)
        self._space, self._table = bench.space, SpaceTable(bench.space)
        self._problem = problem
        self.planner = Preparations(bench, study, self._seeds)

    def sampler(self, seed: int) -> BaseSampler:
        """The sampler of a run; without sensitivities Optuna's TPE takes the place of `front`."""
        damage = measured_damage(self._table, self._study)
        if damage is not None:
            store_sensitivity(self._study, sensitivity_of(self._table, damage))
        if self._make is not None:
            made = self._make(seed)
            return made if self._name in SAMPLERS else OwnSampler(self._name, made, self._space)
        if damage is None:
            return SAMPLERS["tpe"](seed)
        learner = latency_learner(self._table, self._study)
        return FrontSampler(self._table, damage, learner, self._problem, seed)

    def on_prepared(self, _study: SearchStudy) -> None:
        """Enqueue the seeds: solved recipes from mild to strong, then those of a warm start."""
        seeds = []
        damage = measured_damage(self._table, self._study) if self._seeds else None
        if damage is not None:
            trials = self._study.optuna.get_trials(deepcopy=False)
            model = latency_learner(self._table, self._study)(finished_trials(self._table, trials))
            seeds = [self._table.params(o) for o in seed_recipes(self._table, damage, model)]
        for params in seeds:
            self._enqueue(params, "seed")
        for params in warm_seeds(self._study):
            self._enqueue(params, "warm start")

    def _enqueue(self, params: dict[str, Any], origin: str) -> None:
        """Where a driver that was killed meanwhile has not enqueued them before, nor as another seed."""
        self._study.optuna.enqueue_trial(params, user_attrs={"origin": origin}, skip_if_exists=True)


class Preparations:
    """The preparatory jobs: latency probes of random recipes and the damage of single choices."""

    def __init__(self, bench: Bench, study: SearchStudy, wanted: bool) -> None:
        self._study, self._wanted = study, wanted
        self._table = SpaceTable(bench.space)
        self._seed = bench.config.seed

    def pending(self) -> Sequence[Job]:
        """Jobs whose results the study does not have."""
        if not self._wanted or not self._table.names:
            return []
        stored = self._study.job_results()
        jobs = sensitivity_jobs(self._table.space, CHUNKS)
        probes = probe_recipes(self._table, PROBES, self._seed)
        jobs += [
            Job(kind="probe", name=f"{PROBE} {k + 1}/{len(probes)}", recipe=recipe)
            for k, recipe in enumerate(probes)
        ]
        return [job for job in jobs if job.name not in stored]


def probe_recipes(table: SpaceTable, count: int, seed: int) -> list[Recipe]:
    """Recipes for the latency model: every bit-width used everywhere, also with polynomials for activation
    functions where there are such, a fast one of these with the fewest boxes in suppression, then random
    mixtures.

    Half of the random ones keep to one bit-width, the others mix two: the widths are drawn per parameter
    with a share of its own, and so is how far every other kind of choice goes. No recipe comes twice; a space
    that is used up gives fewer than `count`.
    """
    random = np.random.default_rng(seed)
    bits = np.array([name.startswith("bits ") for name in table.names])
    every = [parameter.kind for parameter in table.space.parameters.values()]
    others = list(dict.fromkeys(kind for kind in every if kind != "quantize"))
    kinds = np.array([others.index(kind) if kind in others else 0 for kind in every], np.int64)
    starts = [*uniform_starts(table), *smooth_starts(table)]
    rows = starts[1:]
    if PreNmsTopK.kind in every:
        halves = [row for row in starts if narrowest(table, row) == BFLOAT16_BITS]
        fast = (halves or starts[:1])[-1]  # where the share of what suppression takes is largest
        last = np.array([kind == PreNmsTopK.kind for kind in every])
        rows.append(np.where(last, table.sizes - 1, fast))
    every_row = {row.tobytes(): row for row in rows}
    for draw in range(len(every_row), DRAWS * count):
        if len(every_row) >= count:
            break
        strength = np.array([random.random() for _ in range(int(kinds.max(initial=0)) + 1)])[kinds]
        pruned = random.binomial(np.maximum(table.sizes - 1, 0), strength)
        most = int(table.sizes[bits].max(initial=1))
        first, second = random.integers(most), random.integers(most)
        share = random.random() if draw % 2 else 1.0
        chosen = np.where(random.random(len(bits)) < share, first, second)
        row = np.where(bits, np.minimum(chosen, table.sizes - 1), pruned)
        every_row.setdefault(row.tobytes(), row)
    return [table.space.recipe(table.params(row)) for row in list(every_row.values())[:count]]


def sampler_named(name: str) -> Callable[[int], BaseSampler]:
    """A maker of Optuna samplers from a seed.

    Raises:
        InputError: unknown name, or a user's sampler that is refused by `own_sampler`.
    """
    if name in SAMPLERS:
        return SAMPLERS[name]
    if ":" not in name:
        known = f"front, {', '.join(SAMPLERS)}"
        raise InputError("search.sampler", name, f"choose {known}, module:Class or file.py:Class")
    return own_sampler(name)
