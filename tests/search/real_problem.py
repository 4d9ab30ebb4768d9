"""A small real study: the embedded detector at 96 pixels on a few digits, pruned, trained for 2 epochs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial

from evaluators.bench import Bench
from evaluators.bench_config import BenchConfig, LatencyConfig, SpaceConfig
from evaluators.datasets.base import DataConfig
from evaluators.datasets.digits import write_digits
from evaluators.finetune import FineTunePlan
from evaluators.pipeline import worker_factory
from evaluators.ranking import Problem
from search.judge import ProblemJudge
from search.loop import SearchOutcome, run_search
from search.parts import SearchParts
from search.rungs import HalvingRule
from search.study import SearchStudy, open_study
from search.trials import recipe_of
from search.workers import Pool
from spaces.effects import total_macs

WEIGHTS = Path(__file__).resolve().parents[2] / "scripts" / "configs" / "yolox_digits.safetensors"


def real_bench(folder: Path) -> Bench:
    root = folder / "digits"
    if not root.exists():
        write_digits(root, images={"fit": 80, "select": 8, "report": 1})
    config = BenchConfig(
        model="yolox_digits",
        checkpoint=WEIGHTS,
        size=(96, 96),
        data=DataConfig(root=root, format="coco"),
        space=SpaceConfig(methods=("prune",), granularity="block"),
        finetune=FineTunePlan(epochs=2, batch_size=4, mirror=False),
        latency=LatencyConfig(images=4, min_rounds=8, max_rounds=16, time_limit_s=0.5),
        importance="magnitude",
        calibration_images=4,
        cache=folder / "cache",
    )
    return Bench(config)


def real_study(folder: Path, bench: Bench) -> SearchStudy:
    problem = Problem()
    objectives = dict(zip(problem.objectives, problem.directions, strict=True))
    return open_study("real", bench.fingerprint(), objectives, url=f"sqlite:///{folder}/paredown.db")


def run_real(folder: Path, trials: int, pool: Pool | None = None) -> tuple[SearchStudy, SearchOutcome]:
    """Trial 1 prunes every site mildly, trial 2 all of them as far as it goes; company of two at a rung."""
    bench = real_bench(folder)
    study = real_study(folder, bench)
    space = bench.space

    def seeds(prepared: SearchStudy) -> None:
        for position in (1, -1):
            params = {name: p.values[position] for name, p in space.parameters.items()}
            prepared.optuna.enqueue_trial(params)

    def ratios(_: Sequence[FrozenTrial], asked: Sequence[FrozenTrial]) -> NDArray[np.float64]:
        whole = total_macs(bench.identity, bench.sites)
        recipes = [recipe_of(trial) for trial in asked]
        return np.array([total_macs(recipe, bench.sites) / whole for recipe in recipes if recipe])

    parts = SearchParts(
        distributions=space.distributions(),
        to_recipe=space.recipe,
        base_params=space.identity_params(),
        judge=ProblemJudge(study, Problem()),
        sampler=lambda seed: RandomSampler(seed=seed),
        on_prepared=seeds,
        rungs=HalvingRule(study, Problem(), (0, 1), ratios, company=2),
    )
    factory = worker_factory(bench.config, study.artifacts)
    return study, run_search(study, parts, factory, trials=trials, pool=pool or Pool())


if __name__ == "__main__":
    run_real(Path(sys.argv[1]), int(sys.argv[2]))
