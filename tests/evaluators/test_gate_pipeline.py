"""Constant gates on their way through a worker: their means, damage, and a file without a squeeze."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torchvision.ops import SqueezeExcitation

from evaluators.evaluation import Evaluation
from evaluators.gates import mean_gates
from evaluators.jobs import Job
from evaluators.parity import require_parity
from evaluators.pipeline import CandidateWorker
from evaluators.teacher import batch_of
from evaluators.torch_session import TorchSession
from spaces.apply import rebuild
from spaces.gates import ConstantGate
from spaces.recipe import Gate, Prune, Quantize, Recipe

NAME = "ssdlite_digits"


@pytest.fixture(scope="module")
def worker(make_lively_worker: Callable[..., CandidateWorker]) -> CandidateWorker:
    return make_lively_worker(NAME, "prune", "quantize", "gate")


def test_means_are_those_of_the_blocks_own_gates(worker: CandidateWorker) -> None:
    bench = worker.bench
    found = mean_gates(bench.base, bench.detector, bench.fit, bench.slot, list(bench.sites.gate))
    name = next(iter(bench.sites.gate))
    block = bench.base.get_submodule(name)
    assert isinstance(block, SqueezeExcitation)
    read: list[torch.Tensor] = []
    handle = block.register_forward_hook(lambda m, inputs, _: read.append(inputs[0]))
    with torch.no_grad():
        for k in range(len(bench.fit)):
            bench.base(batch_of(bench.fit, bench.detector, np.array([k]), False))
    handle.remove()
    x = torch.cat(read)
    with torch.no_grad():
        wanted = block(x)
    active = x.abs().amax(dim=(0, 2, 3)) > 0
    assert active.any()
    # Least squares, channel by channel: no other constant leaves less of a difference.
    slow = (x * wanted).sum(dim=(0, 2, 3)) / x.square().sum(dim=(0, 2, 3))
    torch.testing.assert_close(found[name][active], slow[active], rtol=1e-3, atol=1e-4)
    assert (found[name][~active] == 1).all()
    assert set(found) <= set(bench.sites.gate)


def test_every_gate_has_a_damage_of_its_own(worker: CandidateWorker) -> None:
    recipes = [Recipe(detector=NAME, choices=(Gate(site=name),)) for name in worker.bench.sites.gate]
    payload = {"recipes": [recipe.to_json() for recipe in recipes]}
    result = list(worker.run(Job(kind="damage", name="damage", payload=payload)))[-1].result
    assert result is not None
    damage = [result["damage"][recipe.key] for recipe in recipes]
    assert len(damage) == 8
    assert all(0 <= one < float("inf") for one in damage)
    assert len(set(damage)) > 4


def test_a_trial_learns_its_gates_and_its_file_has_no_squeeze(worker: CandidateWorker) -> None:
    bench, gates = worker.bench, worker.bench.sites.gate
    pruned = list(bench.sites.channel)[2]
    bits = [Quantize(site=n, weight_bits=8, activation_bits=8) for n in list(bench.sites.layer)[-3:]]
    choices = (*(Gate(site=name) for name in gates), Prune(site=pruned, sparsity=0.5), *bits)
    recipe = Recipe(detector=NAME, choices=choices)
    reports = list(worker.run(Job(kind="trial", name="trial 1", number=1, recipe=recipe, seed=1)))
    assert any("fine-tune" in report.stage for report in reports)
    assert reports[-1].result is not None
    evaluation = Evaluation.model_validate(reports[-1].result)
    assert evaluation.status == "ok"
    assert evaluation.artifact is not None
    graph = onnx.load(evaluation.artifact).graph
    assert not [node for node in graph.node if node.op_type in ("GlobalAveragePool", "ReduceMean")]
    again, draft = rebuild(bench.detector.build(), Path(evaluation.artifact).parent)
    assert again == recipe
    network = draft.network.eval()
    learnt = {n: m for n, m in network.named_modules() if isinstance(m, ConstantGate)}
    assert set(learnt) == set(gates)
    means = bench.statistics_for(recipe)
    whole = {n: m for n, m in learnt.items() if len(m.gates) == len(means[n])}
    assert any(not torch.allclose(m.gates.detach(), means[n], atol=1e-6) for n, m in whole.items())
    session = bench.target.prepare(Path(evaluation.artifact), bench.config.threads)
    assert evaluation.details["fell_back"] == {}
    plain = Recipe(detector=NAME, choices=choices[:-3])
    folder = worker.artifacts / "float"
    bench.export(network, {}, plain, folder)
    session = bench.target.prepare(folder / bench.target.model_file, bench.config.threads)
    require_parity(session, TorchSession(bench.whole(network)), bench.timing_inputs)
