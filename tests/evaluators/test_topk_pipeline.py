"""Fewer boxes in suppression on their way through a worker: damage, and a file that looks at no more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from evaluators.accuracy import score_session
from evaluators.bench_config import SpaceConfig
from evaluators.damage import Damage
from evaluators.evaluation import Evaluation
from evaluators.exported import ModelCard
from evaluators.jobs import Job
from evaluators.latency_model import fit_latency
from evaluators.pipeline import CandidateWorker
from evaluators.scored_damage import ScoredDamage, equivalent
from evaluators.torch_session import TorchSession
from search.sensitivity import sensitivity_jobs
from spaces.recipe import Prune, Recipe, TopK
from spaces.table import SpaceTable

NAME = "yolox_digits"


@pytest.fixture(scope="module")
def worker(make_worker: Callable[..., CandidateWorker]) -> CandidateWorker:
    return make_worker(space=SpaceConfig(methods=("prune", "topk")))


def of(count: int, *others: Prune) -> Recipe:
    return Recipe(detector=NAME, choices=(TopK(count=count), *others))


def test_the_file_looks_at_so_many_boxes_and_says_so(worker: CandidateWorker) -> None:
    bench, recipe = worker.bench, of(5)
    reports = list(worker.run(Job(kind="trial", name="trial 1", number=1, recipe=recipe, seed=1)))
    assert [r.stage for r in reports] == ["compress", "export", "score", "latency", "done"], "no training"
    evaluation = Evaluation.model_validate(reports[-1].result)
    assert evaluation.artifact is not None
    model = Path(evaluation.artifact)
    card = ModelCard.beside(model)
    assert card.postprocess.pre_nms_topk == 5
    assert card.postprocess.max_detections == bench.postprocess.max_detections
    session = bench.target.prepare(model, card.runtime.threads, card.runtime.hint)
    figures, found = score_session(session, bench.splits["select"], bench.select, card.preprocess)
    assert max(len(d.scores) for d in found.values()) <= 5
    slow, _ = score_session(
        TorchSession(bench.whole(bench.base, recipe)), bench.splits["select"], bench.select, card.preprocess
    )
    assert figures["map"] == pytest.approx(slow["map"], abs=0.05)
    plain, _ = score_session(
        TorchSession(bench.whole(bench.base)), bench.splits["select"], bench.select, card.preprocess
    )
    assert plain["map"] > slow["map"] > 10


def test_damage_is_that_of_a_network_that_loses_as_much(worker: CandidateWorker) -> None:
    bench, damage = worker.bench, Damage(worker.bench)
    scored = ScoredDamage(bench)
    lost = scored._plain - scored._score(bench, bench.base, of(5))
    assert lost > 0
    assert damage.of(of(5)) == pytest.approx(equivalent(lost, *scored._known))
    pruned = next(Prune(site=name, sparsity=0.25) for name in bench.sites.channel if "dark3" in name)
    alone = damage.of(Recipe(detector=NAME, choices=(pruned,)))
    assert alone > 0
    assert damage.of(of(5, pruned)) == pytest.approx(alone + damage.of(of(5)))


def test_the_job_of_what_the_ap_tells_holds_it(worker: CandidateWorker) -> None:
    first, *others = sensitivity_jobs(worker.bench.space, 4)
    assert first.name == "sensitivity by AP"
    recipes = [Recipe.from_json(text) for text in first.payload["recipes"]]
    assert recipes
    assert all(recipe.of_kind(TopK) for recipe in recipes)
    assert not any(Recipe.from_json(t).of_kind(TopK) for job in others for t in job.payload["recipes"])


def test_the_latency_model_learns_what_a_box_costs(worker: CandidateWorker) -> None:
    """Latencies made of multiplications and boxes alone are told apart."""
    table = SpaceTable(worker.bench.space)
    random = np.random.default_rng(0)
    options = random.integers(0, table.sizes, size=(60, len(table.sizes)))
    shapes = table.shapes(options)
    ratios = 0.7 * shapes.macs.sum(1) / table.base.macs.sum() + 0.2 * shapes.boxes[:, -1] + 0.1
    model = fit_latency(table, options[:50], ratios[:50])
    np.testing.assert_allclose(model.predict(options[50:]), ratios[50:], rtol=0.05)
    k = table.names.index("top-k suppression")
    few = np.zeros((1, len(table.sizes)), np.int64)
    few[0, k] = table.sizes[k] - 1
    saved = model.predict(np.zeros_like(few)) - model.predict(few)
    share = 1 - float(table.shapes(few).boxes[0, -1])
    assert saved[0] == pytest.approx(0.2 * share, rel=0.25)
