"""A search whose candidates cost nothing: a real space, study, sampler and judge around made-up figures.

What is measured with it is the search's own time, so everything that is written and read has the size of a
real candidate's: as many parameters, metrics and samples of latency.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.samplers import BaseSampler

from evaluators.evaluation import Evaluation, Measurement
from evaluators.jobs import Job
from evaluators.ranking import Problem
from search.judge import ProblemJudge
from search.knowledge import LatencyLearner
from search.parts import SearchParts
from search.retention import STATE_FILES, retain
from search.sampler import FrontSampler
from search.sensitivity import sensitivity_of, store_sensitivity
from search.strategy import probe_recipes
from search.study import SearchStudy, open_study
from spaces.detectors.registry import make_detector
from spaces.recipe import Prune, Quantize, Recipe
from spaces.sites import find_sites
from spaces.space import CPU, SearchSpace, build_space
from spaces.table import SpaceTable

DETECTOR = "yolox_nano"
BASE_MAP, BASE_MS = 60.0, 7.0
PROBES = 16
SAMPLES = 40
"""Rounds of a latency measurement, whose times of both models are stored."""
METRICS = ("map_50", "map_75", "map_small", "map_medium", "map_large", "ar_1", "ar_10", "ar_100")
KEEP_MB = 2000.0
PROBLEM = Problem(limits={"map_drop": ("<=", 5.0)})


def space_of(parameters: int) -> SearchSpace:
    """The space of YOLOX-nano with at most so many parameters, spread evenly over the network."""
    detector = make_detector(DETECTOR, num_classes=3)
    whole = build_space(detector, find_sites(detector, detector.build()), CPU)
    every = list(whole.parameters.values())
    chosen = sorted({round(k) for k in np.linspace(0, len(every) - 1, min(parameters, len(every)))})
    return SearchSpace(whole.detector, whole.sites, [every[k] for k in chosen], capabilities=CPU)


def figures_of(recipe: Recipe) -> tuple[float, float]:
    """mAP and latency ratio of a recipe: what each choice costs and saves is drawn by its site's name."""
    loss, saved, sites = 0.0, 0.0, 0
    for choice in recipe.choices:
        match choice:
            case Prune():
                extent = choice.sparsity
            case Quantize():
                extent = 1.0 - choice.weight_bits / 32
            case _:
                continue
        drawn = zlib.crc32(f"{choice.kind} {choice.site}".encode())
        loss += (drawn % 1000) / 1000 * extent**2
        saved += (drawn // 1000 % 1000) / 1000 * extent
        sites += 1
    share = 1 / max(sites, 20)
    return BASE_MAP - 80.0 * loss * share, float(np.exp(-2.0 * saved * share))


def evaluation_of(recipe: Recipe, seconds: dict[str, float] | None = None, **details: Any) -> Evaluation:
    """A successful evaluation of the size of a real one."""
    quality, ratio = figures_of(recipe)
    percent = "AP, 0..100"
    times = [round(BASE_MS + 0.01 * k, 4) for k in range(SAMPLES)]
    paired = {"base_ms": times, "candidate_ms": [round(ratio * ms, 4) for ms in times]}
    layers = {c.site: [16, 24, 8, 8] for c in recipe.choices if isinstance(c, Prune)}
    metrics = {"map": Measurement(value=quality, unit=percent)}
    metrics |= {name: Measurement(value=0.9 * quality, unit=percent) for name in METRICS}
    metrics |= {
        "latency_ratio": Measurement(
            value=ratio, unit="candidate / base", low=0.98 * ratio, high=1.02 * ratio
        ),
        "latency_ms": Measurement(value=BASE_MS * ratio, unit="ms"),
        "size_mb": Measurement(value=3.6 * ratio, unit="MB"),
        "params": Measurement(value=900_000 * ratio, unit="parameters"),
        "macs": Measurement(value=3e8 * ratio, unit="MACs"),
        "peak_memory_mb": Measurement(value=80.0, unit="MB"),
        "train_step_ms": Measurement(value=400.0, unit="ms"),
    }
    return Evaluation(
        recipe_key=recipe.key,
        status="ok",
        metrics=metrics,
        split="made up",
        environment={"cpu": "made up", "threads": 1},
        details={"latency": paired, "layers": layers, **details},
        seconds=seconds or {},
    )


class MadeUpSearch:
    """A space with what a search would have measured of it before its first candidate.

    Args:
        parameters: of the space, at most.
        seed: of the damages, and of the sampler.
    """

    def __init__(self, parameters: int, seed: int = 0) -> None:
        self.space, self.seed = space_of(parameters), seed
        self.table = SpaceTable(self.space)
        random = np.random.default_rng(seed)
        steps = random.lognormal(-2.0, 1.0, (len(self.table.names), int(self.table.sizes.max())))
        steps[:, 0] = 0.0
        self.damage: NDArray[np.float64] = np.cumsum(steps, axis=1)
        self.damage[np.arange(self.damage.shape[1]) >= self.table.sizes[:, None]] = np.inf
        probes = probe_recipes(self.table, PROBES, seed)
        self._probes = self.table.options([self.space.params(recipe) for recipe in probes])
        self._ratios = np.array([figures_of(recipe)[1] for recipe in probes])

    def study(self, name: str, url: str, folder: Path) -> SearchStudy:
        """The study of that name in a database, opened or made."""
        fingerprint = {"detector": DETECTOR, "input size": "416x416", "data": "made up"}
        study = open_study(
            name,
            fingerprint | self.space.summary(),
            {"map": "maximize", "latency_ms": "minimize"},
            url=url,
            artifacts=folder / name,
        )
        store_sensitivity(study, sensitivity_of(self.table, self.damage))
        return study

    def write_files(self, study: SearchStudy, number: int) -> None:
        """What is left on disk of a trial that is not on the front."""
        folder = study.trial_folder(number)
        folder.mkdir(parents=True)
        for pattern in STATE_FILES:
            (folder / pattern.replace("*", "weights")).write_bytes(bytes(100))

    def parts(self, study: SearchStudy, jobs: Sequence[Job] = ()) -> SearchParts:
        """Everything else of a search: our sampler, the judge, and preparatory jobs."""
        return SearchParts(
            distributions=self.space.distributions(),
            to_recipe=self.space.recipe,
            base_params=self.space.identity_params(),
            judge=ProblemJudge(study, PROBLEM),
            sampler=self.sampler,
            seed=self.seed,
            planner=_Planned(study, jobs) if jobs else None,
            after_trial=lambda of, _number: _retain(of),
        )

    def sampler(self, seed: int) -> BaseSampler:
        """Ours, knowing what a search would have measured."""
        learner = LatencyLearner(self.table, self._probes, self._ratios)
        return FrontSampler(self.table, self.damage, learner, PROBLEM, seed)


def _retain(study: SearchStudy) -> None:
    retain(study, KEEP_MB)


class _Planned:
    """A `search.parts.Planner` of a fixed list of jobs."""

    def __init__(self, study: SearchStudy, jobs: Sequence[Job]) -> None:
        self._study, self._jobs = study, jobs

    def pending(self) -> Sequence[Job]:
        stored = self._study.job_results()
        return [job for job in self._jobs if job.name not in stored]
