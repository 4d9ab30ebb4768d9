"""A smaller input on its way through a worker: damage, probe, a trial whose file is scored as users would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evaluators.accuracy import score_session
from evaluators.bench_config import SpaceConfig
from evaluators.datasets.letterbox import LetterboxedImages
from evaluators.evaluation import Evaluation
from evaluators.exported import ModelCard
from evaluators.jobs import Job
from evaluators.latency import SETTLING
from evaluators.pipeline import CandidateWorker
from evaluators.resized import DISTILLED
from evaluators.scored_damage import ScoredDamage, equivalent, shaken
from evaluators.targets.base import Detections
from evaluators.torch_session import TorchSession
from search.sensitivity import LEVELS, damage_table, sensitivity_jobs
from spaces.apply import rebuild, same_state
from spaces.detectors.registry import make_detector
from spaces.detectors.weights import save_weights
from spaces.detectors.yolox import YoloX
from spaces.effects import bits_by_layer, total_macs
from spaces.errors import InputError
from spaces.recipe import Prune, Quantize, Recipe, Resize, identity
from spaces.table import SpaceTable

SMALLER = Resize(height=96, width=96)
NAME = "yolox_digits"


@pytest.fixture(scope="module")
def worker(make_worker: Callable[..., CandidateWorker]) -> CandidateWorker:
    """At 128 pixels, where 96 and 64 are on offer, and 96 for one side."""
    return make_worker(size=(128, 128), space=SpaceConfig(methods=("prune", "quantize", "resize")))


def mixed(worker: CandidateWorker) -> Recipe:
    """Smaller, a quarter of the deepest channels gone, the neck at 8 bits."""
    sites = worker.bench.sites
    return Recipe(
        detector=NAME,
        choices=(
            SMALLER,
            *(Prune(site=name, sparsity=0.25) for name in sites.channel if "dark5" in name),
            *(Quantize(site=n, weight_bits=8, activation_bits=8) for n in sites.layer if "C3_p3" in n),
        ),
    )


@pytest.fixture(scope="module")
def evaluation(worker: CandidateWorker) -> Evaluation:
    reports = list(worker.run(Job(kind="trial", name="trial 1", number=1, recipe=mixed(worker), seed=1)))
    stages = ["compress", "teacher", "fine-tune 1/1", "export", "score", "latency", "done"]
    assert [report.stage for report in reports] == stages
    return Evaluation.model_validate(reports[-1].result)


def test_the_file_is_of_its_own_size_and_scored_on_the_same_objects(
    worker: CandidateWorker, evaluation: Evaluation
) -> None:
    bench, recipe = worker.bench, mixed(worker)
    assert evaluation.status == "ok"
    assert evaluation.artifact is not None
    model = Path(evaluation.artifact)
    card = ModelCard.beside(model)
    assert card.preprocess.size == (96, 96)
    assert card.recipe == recipe
    session = bench.target.prepare(model, card.runtime.threads, card.runtime.hint)
    split, look = bench.splits["select"], card.preprocess
    images = LetterboxedImages.build(split, look.size, look.pad_value, bench.config.cache)
    figures, found = score_session(session, split, images, look)
    assert figures["map"] == evaluation.metrics["map"].value > 10
    assert evaluation.metrics["macs"].value == total_macs(recipe, bench.sites)
    assert evaluation.metrics["macs"].value < 0.6 * total_macs(bench.identity, bench.sites)
    farthest = {image.id: found[image.id].boxes.max(initial=0.0) for image in split.images}
    assert max(farthest.values()) > 96, "in pixels of the original"
    assert all(farthest[image.id] <= 1.05 * max(image.width, image.height) for image in split.images)


def test_its_base_runs_in_full_size(worker: CandidateWorker, evaluation: Evaluation) -> None:
    base = ModelCard.beside(worker.artifacts / "base" / worker.bench.target.model_file)
    assert base.preprocess.size == (128, 128)
    assert base.recipe.is_identity
    assert evaluation.details["unseen"] == []


def test_the_candidate_and_the_base_are_timed_on_the_same_images(worker: CandidateWorker) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[np.ndarray] = []  # type: ignore[type-arg]

        def run(self, images: np.ndarray) -> Detections:  # type: ignore[type-arg]
            self.seen.append(images)
            return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))

        def kernels(self) -> dict[str, str]:
            return {}

    candidate, base = Recorder(), Recorder()
    worker.bench.at(mixed(worker)).timed(candidate, base)
    assert {x.shape for x in candidate.seen} == {(1, 3, 96, 96)}
    assert {x.shape for x in base.seen} == {(1, 3, 128, 128)}
    count = worker.bench.config.latency.images
    each = slice(3, 3 + (1 + SETTLING) * count, 1 + SETTLING)  # behind the warm-up, an image a turn
    small, large = (torch.from_numpy(np.concatenate(r.seen[each])) for r in (candidate, base))
    shrunk = torch.nn.functional.interpolate(large, size=(96, 96), mode="bilinear", antialias=True)
    apart = (shrunk[:, None] - small[None]).abs().mean(dim=(2, 3, 4))
    assert apart.argmin(dim=1).tolist() == list(range(count))


def test_the_stored_state_makes_the_same_file_again(
    worker: CandidateWorker, evaluation: Evaluation, tmp_path: Path
) -> None:
    assert evaluation.artifact is not None
    model, bench = Path(evaluation.artifact), worker.bench.at(mixed(worker))
    recipe, draft = rebuild(bench.detector.build(), model.parent)
    assert draft.size == (96, 96)
    written, _ = bench.export(draft.network, bits_by_layer(recipe, bench.sites), recipe, tmp_path)
    assert written.read_bytes() == model.read_bytes()


def test_damage_grows_as_the_input_shrinks(worker: CandidateWorker) -> None:
    sizes = [Recipe(detector=NAME, choices=(Resize(height=side, width=side),)) for side in (96, 64)]
    pruned = tuple(Prune(site=n, sparsity=0.5) for n in worker.bench.sites.channel if "dark5" in n)
    both = Recipe(detector=NAME, choices=(SMALLER, *pruned))
    recipes = [identity(NAME), *sizes, both]
    payload = {"recipes": [recipe.to_json() for recipe in recipes]}
    *_, last = worker.run(Job(kind="damage", name="damage", payload=payload))
    assert last.result is not None
    none, mild, strong, more = (last.result["damage"][recipe.key] for recipe in recipes)
    assert none == pytest.approx(0.0, abs=1e-6)
    assert 0 < mild < strong
    alone = Recipe(detector=NAME, choices=pruned)
    *_, last = worker.run(Job(kind="damage", name="more", payload={"recipes": [alone.to_json()]}))
    assert last.result is not None
    assert more == pytest.approx(mild + last.result["damage"][alone.key], rel=1e-4)


def test_all_sizes_are_measured_in_one_job_and_keep_their_order(worker: CandidateWorker) -> None:
    space = worker.bench.space
    first, *others = sensitivity_jobs(space, 4)
    name = next(name for name, parameter in space.parameters.items() if parameter.kind == "resize")
    sizes = [space.recipe({name: value}) for value in space.parameters[name].values[1:]]
    assert len(sizes) > LEVELS
    assert first.payload["recipes"] == [recipe.to_json() for recipe in sizes]
    assert not any(Recipe.from_json(t).of_kind(Resize) for job in others for t in job.payload["recipes"])
    costs = {recipe.key: float(k % 2) for k, recipe in enumerate(sizes)}
    table = SpaceTable(space)
    row = damage_table(table, [{"damage": costs}])[table.names.index(name)]
    assert row[: len(sizes) + 1].tolist() == [0.0, *costs.values()]


def test_a_size_costs_what_a_network_does_that_loses_as_much(worker: CandidateWorker) -> None:
    bench = worker.bench
    damage = ScoredDamage(bench)
    recipes = [Recipe(detector=NAME, choices=(Resize(height=s, width=s),)) for s in (96, 64)]
    found = [damage.of(recipe) for recipe in recipes]
    lost = []
    for recipe in (bench.identity, *recipes):
        own = bench.at(recipe)
        session = TorchSession(own.whole(own.base))
        figures, _ = score_session(session, own.splits["select"], own.select, own.detector.preprocess)
        lost.append(figures["map"])
    assert lost[0] > lost[1] > lost[2]
    losses, distances = damage._known
    wanted = [equivalent(lost[0] - one, losses, distances) for one in lost[1:]]
    assert found == pytest.approx(wanted)
    assert np.all(np.diff(distances) > 0)


def test_a_loss_stands_for_the_distance_of_a_network_that_loses_as_much() -> None:
    losses, distances = [1.0, 0.5, 4.0], [2.0, 3.0, 9.0]  # the second loss is taken for 1, too
    assert equivalent(-0.1, losses, distances) == 0.0
    assert equivalent(0.5, losses, distances) == pytest.approx(1.0)
    assert equivalent(2.5, losses, distances) == pytest.approx(6.0)  # half way from 3 to 9
    assert equivalent(8.0, losses, distances) == pytest.approx(18.0)
    assert equivalent(0.1, [-1.0, -2.0], [2.0, 5.0]) == 5.0


def test_shaking_disturbs_more_the_stronger_it_is(worker: CandidateWorker) -> None:
    base, images = worker.bench.base, worker.bench.batch(worker.bench.fit, 2)
    apart = [float((shaken(base, s)(images)[0] - base(images)[0]).abs().mean()) for s in (0.0, 0.05, 0.2)]
    assert apart[0] == 0.0
    assert 0.0 < apart[1] < apart[2]


def test_a_probe_times_the_smaller_input(worker: CandidateWorker) -> None:
    smallest = Recipe(detector=NAME, choices=(Resize(height=64, width=64),))
    *_, last = worker.run(Job(kind="probe", name="probe", recipe=smallest))
    assert last.result is not None
    assert last.result["low"] < 0.8, "a quarter of the multiplications cannot take as long as all of them"


def test_benches_of_a_study_share_what_does_not_depend_on_the_size(worker: CandidateWorker) -> None:
    bench, smaller = worker.bench, worker.bench.at(mixed(worker))
    assert bench.at(bench.identity) is bench
    assert bench.at(mixed(worker)) is smaller
    assert smaller.at(bench.identity) is bench
    assert same_state(smaller.base.state_dict(), bench.base.state_dict())
    assert smaller.space is bench.space
    assert smaller.detector.preprocess == bench.detector.preprocess.model_copy(update={"size": (96, 96)})
    assert smaller.fit.pixels.shape[1:3] == (96, 96)
    assert list(smaller.fit.image_ids) == list(bench.fit.image_ids)
    plan, whole = smaller.config.finetune, bench.config.finetune
    assert plan.distill_weight == DISTILLED * whole.distill_weight
    assert plan.task_weight == whole.task_weight


class OfItsSize(YoloX):
    """Keeps the size of its input in a buffer."""

    def __init__(self, name: str, num_classes: int, size: tuple[int, int]) -> None:
        super().__init__(name, num_classes, size, depth=0.33, width=0.125)

    def build(self) -> nn.Module:
        network = super().build()
        network.register_buffer("extent", torch.tensor(self.preprocess.size))
        return network


def test_a_buffer_of_the_inputs_size_is_of_the_smaller_one(
    make_worker: Callable[..., CandidateWorker], tmp_path: Path
) -> None:
    model = f"{__file__}:OfItsSize"
    save_weights(make_detector(model, 10, (128, 128)).build(), tmp_path / "own.safetensors")
    methods = SpaceConfig(methods=("resize",))
    worker = make_worker(model=model, checkpoint=tmp_path / "own.safetensors", size=(128, 128), space=methods)
    bench = worker.bench
    smaller = bench.at(Recipe(detector=bench.detector.name, choices=(SMALLER,)))
    assert bench.base.get_buffer("extent").tolist() == [128, 128]
    assert smaller.base.get_buffer("extent").tolist() == [96, 96]


def test_a_size_that_is_not_offered_is_refused(worker: CandidateWorker) -> None:
    other = Recipe(detector=NAME, choices=(Resize(height=32, width=32),))
    with pytest.raises(InputError, match=r"32x32.*choose one of 96x128, 128x96, 96x96, 64x64"):
        worker.run(Job(kind="trial", name="trial 2", number=2, recipe=other))
