"""A worker's jobs from recipe to Evaluation, on a few digits, without Ray."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evaluators import measuring
from evaluators.accuracy import map_difference_interval, score_session
from evaluators.evaluation import Evaluation
from evaluators.exported import ModelCard
from evaluators.jobs import HANDED_ON, Job, StageReport
from evaluators.pipeline import CandidateWorker
from evaluators.targets.registry import signature_here
from evaluators.testing import can_run
from spaces.apply import parameters, rebuild, same_state
from spaces.detectors.registry import make_detector
from spaces.detectors.weights import save_weights
from spaces.detectors.yolox import YoloX
from spaces.effects import bits_by_layer, total_macs
from spaces.methods.base import Draft
from spaces.recipe import Prune, Quantize, Recipe, identity
from spaces.sites import Sites
from spaces.testing import lively_network


@pytest.fixture(scope="module")
def worker(make_worker: Callable[..., CandidateWorker]) -> CandidateWorker:
    return make_worker()


def mixed(sites: Sites) -> Recipe:
    """A quarter of the channels of the deepest stage and of the head gone; 8, 16 and 32 bits in turn."""
    pruned = [name for name in sites.channel if "dark5" in name or name.startswith("head")]
    widths = [(32, 16, 8)[k % 3] for k in range(len(sites.layer))]
    choices = [Prune(site=name, sparsity=0.25) for name in pruned]
    choices += [
        Quantize(site=name, weight_bits=width, activation_bits=width)
        for name, width in zip(sites.layer, widths, strict=True)
    ]
    return Recipe(detector="yolox_digits", choices=tuple(choices))


def pruned_everywhere(sites: Sites, sparsity: float) -> Recipe:
    choices = tuple(
        Prune(site=name, sparsity=sparsity) for name, site in sites.channel.items() if site.channels >= 16
    )
    return Recipe(detector="yolox_digits", choices=choices)


def trial(worker: CandidateWorker, recipe: Recipe, number: int) -> tuple[list[StageReport], Evaluation]:
    job = Job(kind="trial", name=f"trial {number}", number=number, recipe=recipe, seed=number)
    reports = list(worker.run(job))
    assert reports[-1].result is not None
    return reports, Evaluation.model_validate(reports[-1].result)


Done = tuple[list[StageReport], Evaluation]


@pytest.fixture(scope="module")
def base(worker: CandidateWorker) -> Done:
    return trial(worker, identity("yolox_digits"), 0)


@pytest.fixture(scope="module")
def kept_drafts() -> list[Draft]:
    return []


@pytest.fixture(scope="module")
def candidate(worker: CandidateWorker, base: Done, kept_drafts: list[Draft]) -> Done:
    """Trial 1; the network that it trained is kept beside its files."""
    save = measuring.save

    def keep(draft: Draft, recipe: Recipe, directory: Path) -> None:
        kept_drafts.append(copy.deepcopy(draft))
        save(draft, recipe, directory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "save", keep)
        return trial(worker, mixed(worker.bench.sites), 1)


def rescored(worker: CandidateWorker, evaluation: Evaluation) -> dict[str, float]:
    """The figures of the file on disk, loaded as a user would."""
    assert evaluation.artifact is not None
    card = ModelCard.beside(Path(evaluation.artifact))
    bench = worker.bench
    session = bench.target.prepare(Path(evaluation.artifact), card.runtime.threads, card.runtime.hint)
    return score_session(session, bench.splits["select"], bench.select, card.preprocess)[0]


def test_the_base(worker: CandidateWorker, base: Done) -> None:
    reports, evaluation = base
    stages = [report.stage for report in reports]
    assert stages[:5] == ["compress", "export", "compare with torch", "score", "latency"]
    assert stages[5:] == ["teacher", "train the base further 1/1", "score the base trained further", "done"]
    metrics = evaluation.metrics
    assert metrics["map"].value > 50  # 73 on all of report
    assert metrics["map_trained_further"].value > 50
    assert metrics["params"].value == parameters(worker.bench.base)
    assert metrics["macs"].value == total_macs(worker.bench.identity, worker.bench.sites)
    assert metrics["train_step_ms"].value > 0  # of the base trained further
    assert set(evaluation.details["kernels"]) == {"f32"}
    reference = json.loads((worker.artifacts / "base" / "reference.json").read_text())["base_ms"]
    assert metrics["latency_ms"].value == pytest.approx(metrics["latency_ratio"].value * reference)
    assert reference == evaluation.details["latency"]["base_ms"]["p50"]
    assert 0.2 < metrics["tensor_ms"].value / metrics["latency_ms"].value < 1.2  # one core, busy perhaps


def test_a_pruned_and_quantised_candidate(worker: CandidateWorker, base: Done, candidate: Done) -> None:
    reports, evaluation = candidate
    bench, recipe = worker.bench, mixed(worker.bench.sites)
    stages = ["compress", "teacher", "fine-tune 1/1", "export", "score", "latency", "done"]
    assert [report.stage for report in reports] == stages
    assert (evaluation.status, evaluation.recipe_key) == ("ok", recipe.key)
    metrics, before = evaluation.metrics, base[1].metrics
    assert metrics["macs"].value == total_macs(recipe, bench.sites) < before["macs"].value
    assert metrics["params"].value < before["params"].value
    assert evaluation.artifact is not None
    assert metrics["size_mb"].value == Path(evaluation.artifact).stat().st_size / 1e6
    assert metrics["size_mb"].value < 0.7 * before["size_mb"].value
    assert metrics["train_step_ms"].value > 0
    assert set(evaluation.seconds) >= {"compress", "fine-tune 1/1", "export", "score", "latency", "suspended"}
    kernels, bits = evaluation.details["kernels"], list(bits_by_layer(recipe, bench.sites).values())
    assert kernels["i8"] == bits.count(8)
    assert evaluation.details["unseen"] == []
    if can_run(16):
        assert evaluation.details["fell_back"] == {}
        assert kernels == {"i8": bits.count(8), "bf16": bits.count(16), "f32": bits.count(32)}


def test_its_ap_is_compared_with_the_bases_image_by_image(
    worker: CandidateWorker, base: Done, candidate: Done
) -> None:
    bench, found = worker.bench, []
    for evaluation in (candidate[1], base[1]):
        assert evaluation.artifact is not None
        card = ModelCard.beside(Path(evaluation.artifact))
        session = bench.target.prepare(Path(evaluation.artifact), card.runtime.threads, card.runtime.hint)
        found.append(bench.scored(session)[1])
    difference = candidate[1].metrics["map_difference"]
    slow = map_difference_interval(bench.splits["select"], found[0], found[1], seed=bench.config.seed)
    assert (difference.value, difference.low, difference.high) == pytest.approx(slow)
    plain = candidate[1].metrics["map"].value - base[1].metrics["map"].value
    assert difference.value == pytest.approx(plain, abs=0.1)
    assert slow[1] < difference.value < slow[2]
    assert "map_difference" not in base[1].metrics


def test_a_trial_that_two_machines_share_is_the_same(
    worker: CandidateWorker, base: Done, candidate: Done
) -> None:
    """The first one has another signature: it trains and hands on what the second one measures."""
    recipe, elsewhere = mixed(worker.bench.sites), copy.copy(worker)
    elsewhere.measures = False
    first = Job(kind="trial", name="trial 7", number=7, recipe=recipe, seed=1)
    reports = list(elsewhere.run(first))
    assert [report.stage for report in reports][-2:] == ["hand on", "handed on"]
    assert reports[-1].result is not None
    second = first.model_copy(update={"kind": "measure", "payload": reports[-1].result})
    *_, last = worker.run(second)
    shared, alone = Evaluation.model_validate(last.result), candidate[1]
    assert shared.artifact is not None
    assert alone.artifact is not None
    assert Path(shared.artifact).read_bytes() == Path(alone.artifact).read_bytes()
    timed = {"latency_ms", "latency_ratio", "tensor_ms", "peak_memory_mb", "train_step_ms"}
    assert shared.metrics.keys() == alone.metrics.keys()
    assert all(shared.metrics[name] == alone.metrics[name] for name in shared.metrics.keys() - timed)
    assert {"compress", "fine-tune 1/1", "hand on", "take over", "score", "latency"} <= shared.seconds.keys()
    probe = Job(kind="probe", name="probe", recipe=recipe)
    (handed,) = elsewhere.run(probe)
    assert handed.result is not None
    assert HANDED_ON in handed.result


def test_a_machine_measures_under_the_signature_of_the_study(
    make_worker: Callable[..., CandidateWorker],
) -> None:
    config = make_worker().bench.config
    here = signature_here(config.target, config.threads)
    folder = Path(config.cache).parent / "artifacts"
    assert CandidateWorker(config, folder).measures
    assert CandidateWorker(config, folder, here).measures
    assert not CandidateWorker(config, folder, {**here, "threads": 7}).measures


@pytest.mark.parametrize("which", ["base", "candidate"])
def test_figures_are_those_of_the_written_file(
    which: str, worker: CandidateWorker, request: pytest.FixtureRequest
) -> None:
    _, evaluation = request.getfixturevalue(which)
    again = rescored(worker, evaluation)
    for name, value in again.items():
        if np.isfinite(value):
            assert evaluation.metrics[name].value == pytest.approx(value, abs=1e-9)
        else:
            assert name not in evaluation.metrics
    card = ModelCard.beside(Path(evaluation.artifact))
    assert card.figures["map"] == evaluation.metrics["map"].value
    assert card.recipe.key == evaluation.recipe_key
    ratio = evaluation.metrics["latency_ratio"]
    assert ratio.low <= ratio.value <= ratio.high
    assert evaluation.split == str(worker.bench.splits["select"].source)


def test_the_stored_state_rebuilds_the_network_bit_for_bit(
    worker: CandidateWorker, candidate: Done, kept_drafts: list[Draft], tmp_path: Path
) -> None:
    bench, folder = worker.bench, Path(candidate[1].artifact).parent
    recipe, draft = rebuild(bench.detector.build().eval(), folder)
    assert recipe == mixed(bench.sites)
    (trained,) = kept_drafts
    assert (draft.channels, draft.bits) == (trained.channels, trained.bits)
    assert same_state(draft.network.state_dict(), trained.network.state_dict())
    images = torch.from_numpy(np.concatenate(bench.inputs(bench.select, 2)))
    assert all(
        torch.equal(a, b)
        for a, b in zip(_outputs(draft.network, images), _outputs(trained.network, images), strict=True)
    )
    model, _ = bench.export(draft.network, bits_by_layer(recipe, bench.sites), recipe, tmp_path)
    assert model.read_bytes() == (folder / "model.onnx").read_bytes()


def _outputs(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        outputs: tuple[torch.Tensor, ...] = network(images)
    return outputs


def test_a_trial_repeats_itself(worker: CandidateWorker, candidate: Done) -> None:
    """Same recipe, same seed: the same detector, whoever was evaluated in between."""
    folder = Path(candidate[1].artifact).parent
    list(worker.run(Job(kind="trial", name="again", number=7, recipe=mixed(worker.bench.sites), seed=1)))
    states = [rebuild(worker.bench.detector.build(), f)[1] for f in (folder, folder.with_name("trial-00007"))]
    assert same_state(*(draft.network.state_dict() for draft in states))


def test_damage_grows_with_what_is_done(worker: CandidateWorker) -> None:
    sites = worker.bench.sites
    everywhere = [
        Recipe(
            detector="yolox_digits",
            choices=tuple(Quantize(site=s, weight_bits=width, activation_bits=width) for s in sites.layer),
        )
        for width in (16, 8)
    ]
    recipes = [
        identity("yolox_digits"),
        *everywhere,
        pruned_everywhere(sites, 0.25),
        pruned_everywhere(sites, 0.75),
    ]
    job = Job(kind="damage", name="damage", payload={"recipes": [recipe.to_json() for recipe in recipes]})
    *_, last = worker.run(job)
    assert last.result is not None
    damage = [last.result["damage"][recipe.key] for recipe in recipes]
    assert damage[0] == pytest.approx(0.0, abs=1e-6)
    assert damage == sorted(damage)
    assert 0 < damage[1] < 0.5 * damage[2] < damage[3]
    assert last.result["seconds"] > 0


def test_a_probe_times_shapes_and_leaves_nothing_behind(worker: CandidateWorker) -> None:
    recipe = pruned_everywhere(worker.bench.sites, 0.75)
    *_, last = worker.run(Job(kind="probe", name="probe", recipe=recipe))
    assert last.result is not None
    assert last.result["low"] <= last.result["ratio"] <= last.result["high"]
    assert last.result["ratio"] < 0.8, "a quarter of the channels cannot take as long as all of them"
    assert last.result["base_ms"] > 0
    assert list((worker.artifacts / "probes").iterdir()) == []


class FixedStem(YoloX):
    """Does not want its first layer to learn."""

    def __init__(self, name: str, num_classes: int, size: tuple[int, int]) -> None:
        super().__init__(name, num_classes, size, depth=0.33, width=0.125)

    def build(self) -> nn.Module:
        network = super().build()
        network.get_parameter(STEM).requires_grad_(False)
        return network


STEM = "backbone.backbone.stem.conv.conv.weight"


def test_what_a_detector_froze_keeps_its_values(
    make_worker: Callable[..., CandidateWorker], tmp_path: Path
) -> None:
    model, weights = f"{__file__}:FixedStem", tmp_path / "own.safetensors"
    save_weights(lively_network(make_detector(model, 10, (96, 96))), weights)
    worker = make_worker(model=model, checkpoint=weights, size=(96, 96))
    bench = worker.bench
    site = next(name for name in bench.sites.channel if "dark5" in name)
    recipe = Recipe(detector=bench.detector.name, choices=(Prune(site=site, sparsity=0.25),))
    job = Job(kind="trial", name="trial 1", number=1, recipe=recipe, seed=1)
    worker.measures = False  # ends where the training does
    list(worker.run(job))
    _, draft = rebuild(bench.detector.build(), worker._folder(job))
    trained, before = draft.network.state_dict(), bench.base.state_dict()
    assert torch.equal(trained[STEM], before[STEM])
    other = "head.stems.0.conv.weight"
    assert not torch.equal(trained[other], before[other])
