"""Fewer proposals on their way through a worker: damage, file, latency model, solver."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from evaluators.evaluation import Evaluation
from evaluators.jobs import Job
from evaluators.latency_model import LatencyModel, features, fit_latency
from evaluators.parity import require_parity
from evaluators.pipeline import CandidateWorker
from evaluators.torch_session import TorchSession
from spaces.apply import rebuild
from spaces.recipe import Proposals, Recipe, identity
from spaces.table import SpaceTable

NAME = "fasterrcnn_digits"
SITE = "roi_heads"


@pytest.fixture(scope="module")
def worker(make_lively_worker: Callable[..., CandidateWorker]) -> CandidateWorker:
    return make_lively_worker(NAME, "prune", "quantize", "proposals")


def of(share: float) -> Recipe:
    return Recipe(detector=NAME, choices=(Proposals(site=SITE, share=share),))


def test_damage_grows_with_what_is_left_out(worker: CandidateWorker) -> None:
    recipes = [identity(NAME), of(0.75), of(0.5), of(0.125)]
    payload = {"recipes": [recipe.to_json() for recipe in recipes]}
    result = list(worker.run(Job(kind="damage", name="damage", payload=payload)))[-1].result
    assert result is not None
    damage = [result["damage"][recipe.key] for recipe in recipes]
    assert damage[0] == pytest.approx(0.0, abs=1e-5)
    assert damage == sorted(set(damage))


def test_a_trial_needs_no_training_and_its_file_looks_at_fewer(worker: CandidateWorker) -> None:
    recipe, bench = of(0.25), worker.bench
    reports = list(worker.run(Job(kind="trial", name="trial 1", number=1, recipe=recipe, seed=1)))
    assert not any("fine-tune" in report.stage for report in reports)
    assert reports[-1].result is not None
    evaluation = Evaluation.model_validate(reports[-1].result)
    assert evaluation.artifact is not None
    model = Path(evaluation.artifact)
    again, draft = rebuild(bench.detector.build(), model.parent)
    assert (again, draft.proposals) == (recipe, {SITE: 12})
    session = bench.target.prepare(model, 1, "f32")
    require_parity(session, TorchSession(bench.whole(draft.network)), bench.timing_inputs)
    graph = onnx.shape_inference.infer_shapes(onnx.load(model)).graph
    crops = {node.output[0] for node in graph.node if node.op_type == "RoiAlign"}
    rows = [v.type.tensor_type.shape.dim[0].dim_value for v in graph.value_info if v.name in crops]
    assert rows == [12]


def test_the_latency_model_tells_crops_from_the_box_head(worker: CandidateWorker) -> None:
    """Latencies of a machine that takes time for each crop and for each multiplication are recovered."""
    table = SpaceTable(worker.bench.space)
    assert table.proposes
    place = table.names.index(f"proposals {SITE}")
    options = np.zeros((5, len(table.names)), np.int64)
    options[:, place] = range(5)
    crops = features(table, table.shapes(options))[:, -2]
    assert crops == pytest.approx([1, 0.75, 0.5, 0.25, 0.125])
    random = np.random.default_rng(0)
    drawn = random.integers(0, table.sizes, (60, len(table.sizes)))
    drawn = np.where(random.random(drawn.shape) < random.random((60, 1)), drawn, 0)

    def latency(some: np.ndarray) -> np.ndarray:
        shapes = table.shapes(some)
        left = shapes.positions[:, -1] / table.base.positions[0, -1]
        return 0.4 * shapes.macs.sum(1) / table.base.macs.sum() + 0.5 * left + 0.1

    model = fit_latency(table, drawn, latency(drawn))
    np.testing.assert_allclose(model.predict(options), latency(options), rtol=0.05)


def test_what_layers_take_adds_up_to_the_prediction(worker: CandidateWorker) -> None:
    """As the solver asks for it: layer by layer, of single changes."""
    table = SpaceTable(worker.bench.space)
    count = features(table, table.base).shape[1]
    model = LatencyModel(table, np.random.default_rng(1).random(count), float("nan"))
    options = np.zeros((1, len(table.names)), np.int64)
    options[0, table.names.index(f"proposals {SITE}")] = 3
    for some in (options, np.zeros_like(options)):
        shapes, layers = table.shapes(some), np.arange(len(table.layers))
        single = table.neighbours(
            some[0], np.zeros(len(layers), np.int64), some[0, [0] * len(layers)], layers
        )
        bits = np.roll(shapes.bits[0], 1)
        bits[0] = shapes.bits[0, 0]
        taken = model.by_layer(single, bits, layers).sum() + model.weights[-1]
        assert taken == pytest.approx(float(model.predict(some)[0]))
