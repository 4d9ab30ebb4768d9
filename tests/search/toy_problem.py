"""The parts of a small search over the toy problem of `fake_workers`, for tests and their subprocesses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna.samplers import RandomSampler

from evaluators.evaluation import Evaluation
from search.parts import SearchParts
from search.study import SearchStudy, open_study
from spaces.recipe import Prune, Recipe

STEPS = [0.0, 0.25, 0.5, 0.75]
FINGERPRINT = {"detector": "toy", "base": "00ff", "data": "digits/select"}
OBJECTIVES: Any = {"map": "maximize", "latency_ms": "minimize"}


class ToyJudge:
    """Objectives map and latency; one limit: at most 20 points of map lost (the base has 80)."""

    def values(self, evaluation: Evaluation) -> Sequence[float]:
        return [evaluation.metrics["map"].value, evaluation.metrics["latency_ms"].value]

    def constraints(self, evaluation: Evaluation) -> Sequence[float]:
        return [(60.0 - evaluation.metrics["map"].value) / 20.0]


def to_recipe(params: dict[str, Any]) -> Recipe:
    return Recipe(
        detector="toy",
        choices=tuple(Prune(site=site, sparsity=sparsity) for site, sparsity in params.items()),
    )


def toy_parts(sites: str = "ab", seed: int = 0, **changes: Any) -> SearchParts:
    """`sites` "abc" adds the site that breaks workers: half of all values of it kill, raise or are NaN."""
    given: dict[str, Any] = {
        "distributions": {site: CategoricalDistribution(STEPS) for site in sites},
        "to_recipe": to_recipe,
        "base_params": dict.fromkeys(sites, 0.0),
        "judge": ToyJudge(),
        "sampler": lambda seed: RandomSampler(seed=seed),
        "seed": seed,
    }
    return SearchParts(**{**given, **changes})


def toy_study(folder: Path, name: str = "toy", url: str | None = None) -> SearchStudy:
    return open_study(
        name,
        FINGERPRINT,
        OBJECTIVES,
        url=url or f"sqlite:///{folder}/paredown.db",
        artifacts=folder / "artifacts" / name,
    )
