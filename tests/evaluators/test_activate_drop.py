"""Cheaper activations and dropped blocks on their way through a worker, with and without other methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from evaluators.accuracy import score_session
from evaluators.bench_config import SpaceConfig
from evaluators.evaluation import Evaluation
from evaluators.exported import ModelCard
from evaluators.jobs import Job
from evaluators.pipeline import CandidateWorker
from spaces.apply import rebuild
from spaces.recipe import Activate, Drop, Prune, Quantize, Recipe, identity

BLOCK = "backbone.backbone.dark3.1.m.1"


@pytest.fixture(scope="module")
def worker(make_worker: Callable[..., CandidateWorker]) -> CandidateWorker:
    return make_worker(size=(96, 96), space=SpaceConfig(methods=("prune", "quantize", "activate", "drop")))


def of(*choices: Activate | Drop | Prune | Quantize) -> Recipe:
    return Recipe(detector="yolox_digits", choices=choices)


def test_damage_of_single_choices(worker: CandidateWorker) -> None:
    stages = list(worker.bench.sites.activation)
    milder = [of(Activate(site=stage, function="hardswish")) for stage in stages]
    relu = [of(Activate(site=stage, function="relu")) for stage in stages]
    recipes = [identity("yolox_digits"), of(Drop(site=BLOCK)), *milder, *relu]
    payload = {"recipes": [recipe.to_json() for recipe in recipes]}
    result = list(worker.run(Job(kind="damage", name="damage", payload=payload)))[-1].result
    assert result is not None
    damage = result["damage"]
    assert damage[recipes[0].key] == pytest.approx(0.0, abs=1e-5)
    assert damage[recipes[1].key] > 0.0
    first, second = (np.array([damage[recipe.key] for recipe in some]) for some in (milder, relu))
    assert (first < second).all()  # hard-swish is the closer one to SiLU, in every stage


def test_a_probe_of_all_methods_together(worker: CandidateWorker) -> None:
    space = worker.bench.space
    assert {"activation dark3", f"block {BLOCK}"} <= set(space.parameters)
    strongest = space.recipe({name: p.values[-1] for name, p in space.parameters.items()})
    result = list(worker.run(Job(kind="probe", name="probe", recipe=strongest)))[-1].result
    assert result is not None
    assert result["ratio"] > 0.0


def test_a_trial_is_trained_exported_and_rebuilt(worker: CandidateWorker) -> None:
    """Layers inside the dropped block are pruned and at 8 bits, too."""
    inside = worker.bench.sites.residual[BLOCK].layers
    sites = worker.bench.sites
    recipe = of(
        Drop(site=BLOCK),
        Activate(site="dark3", function="relu"),
        Activate(site="neck", function="hardswish"),
        *(Prune(site=name, sparsity=0.25) for name in sites.channel if "dark5" in name),
        *(
            Quantize(site=name, weight_bits=8, activation_bits=8)
            for name, site in sites.layer.items()
            if "dark3" in name or set(site.layers) & set(inside)
        ),
    )
    reports = list(worker.run(Job(kind="trial", name="trial 1", number=1, recipe=recipe, seed=1)))
    assert "fine-tune 1/1" in [report.stage for report in reports]
    assert reports[-1].result is not None
    evaluation = Evaluation.model_validate(reports[-1].result)
    assert evaluation.artifact is not None
    model = Path(evaluation.artifact)
    card, bench = ModelCard.beside(model), worker.bench
    session = bench.target.prepare(model, card.runtime.threads, card.runtime.hint)
    figures, _ = score_session(session, bench.splits["select"], bench.select, card.preprocess)
    assert figures["map"] == evaluation.metrics["map"].value
    again, draft = rebuild(bench.detector.build(), model.parent)
    assert again == recipe
    assert draft.dropped == (BLOCK,)
    written = bench.export(
        draft.network, {n: b for n, (b, _) in draft.bits.items()}, recipe, model.parent / "2"
    )
    assert written[0].read_bytes() == model.read_bytes()
    assert not set(inside) & set(session.kernels())
