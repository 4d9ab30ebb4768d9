"""Low rank through a worker: a joint recipe to its Evaluation, and the damage of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluators.bench_config import SpaceConfig
from evaluators.damage import Damage
from evaluators.evaluation import Evaluation
from evaluators.jobs import Job
from evaluators.pipeline import CandidateWorker
from spaces.apply import rebuild
from spaces.layers import count_macs
from spaces.lowrank import Factors
from spaces.recipe import Factorize, Prune, Quantize, Recipe

SITES = ("backbone.C3_n4.conv3", "backbone.C3_n4.m.0.conv2", "backbone.backbone.dark5.0")


@pytest.fixture(scope="module")
def worker(make_worker: Callable[..., CandidateWorker]) -> CandidateWorker:
    return make_worker(
        size=(96, 96),
        space=SpaceConfig(methods=("prune", "factorize", "quantize"), granularity="block"),
        importance="magnitude",
    )


def strongest(worker: CandidateWorker, kind: str, *names: str) -> Recipe:
    """The last option of each parameter of a kind whose name ends with one of `names`."""
    space = worker.bench.space
    chosen = {
        name: p.values[-1]
        for name, p in space.parameters.items()
        if p.kind == kind and (not names or name.endswith(names))
    }
    assert chosen
    return space.recipe(chosen)


def test_a_joint_recipe_from_pruning_to_the_file(worker: CandidateWorker) -> None:
    bench = worker.bench
    base = Job(kind="trial", name="trial 0", number=0, recipe=bench.identity, seed=0)
    assert list(worker.run(base))[-1].stage == "done"
    parts = (
        strongest(worker, "factorize", "dark5.0", "C3_n4"),
        strongest(worker, "quantize", "C3_n4", "dark4.0"),
    )
    pruned = next(name for name in bench.sites.channel if name.startswith("backbone.backbone.dark5.0"))
    choices = (Prune(site=pruned, sparsity=0.25), *parts[0].choices, *parts[1].choices)
    recipe = Recipe(detector="yolox_digits", choices=choices)
    assert {Prune, Factorize, Quantize} == {type(choice) for choice in recipe.choices}
    job = Job(kind="trial", name="trial 1", number=1, recipe=recipe, seed=1)
    reports = list(worker.run(job))
    assert [r.stage for r in reports] == [
        "compress", "teacher", "fine-tune 1/1", "export", "score", "latency", "done",
    ]  # fmt: skip
    evaluation = Evaluation.model_validate(reports[-1].result)
    assert evaluation.artifact is not None
    _, draft = rebuild(bench.detector.build().eval(), Path(evaluation.artifact).parent)
    factors = {name: [plan.kind, *plan.ranks] for name, plan in draft.factors.items()}
    assert evaluation.details["factors"] == factors
    eight = {name for name, (bits, _) in draft.bits.items() if bits == 8}
    assert eight & factors.keys()  # a layer that is both
    metrics = evaluation.metrics
    assert np.isfinite(metrics["map"].value)
    assert metrics["macs"].value == count_macs(draft.network, (96, 96))
    assert metrics["macs"].value < count_macs(bench.base, (96, 96))
    assert metrics["latency_ratio"].value > 0
    images = torch.from_numpy(bench.timing_inputs[0])
    with torch.no_grad():
        outputs = draft.network(images)
    assert all(bool(torch.isfinite(o).all()) for o in outputs)


def test_lower_ranks_do_more_damage_and_bits_add_to_it(worker: CandidateWorker) -> None:
    damage, space = Damage(worker.bench, images=4), worker.bench.space
    name = next(n for n, p in space.parameters.items() if p.kind == "factorize" and n.endswith("dark3.1"))
    found = [damage.of(space.recipe({name: value})) for value in space.parameters[name].values]
    assert found[0] == pytest.approx(0.0, abs=1e-6)
    assert found == sorted(found)
    assert found[-1] > found[0]
    bits = name.replace("rank", "bits")
    both = space.recipe({name: space.parameters[name].values[-1], bits: 8.0})
    assert damage.of(both) > 0  # ranges of the factors are measured, for the base has none


def test_the_base_is_left_alone(worker: CandidateWorker) -> None:
    assert not any(isinstance(module, Factors) for module in worker.bench.base.modules())
