"""Quantisation-aware training: grids by hand, agreement with rounded layers and with exported files."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino as ov
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evaluators.calibration import LayerRanges, Range, calibrate
from evaluators.datasets.letterbox import LetterboxedImages
from evaluators.evaluation import Evaluation
from evaluators.finetune import FineTunePlan
from evaluators.graph import tensor_part
from evaluators.jobs import Job
from evaluators.pipeline import CandidateWorker
from evaluators.postprocess import WholeDetector
from evaluators.qat import FakeQuantized, LearnedGrid, as_exported, rounds_in_training
from evaluators.rounding import round_layer
from evaluators.targets.registry import target_named
from evaluators.teacher import batch_of
from spaces.apply import rebuild, same_state
from spaces.capabilities import Capabilities
from spaces.detectors.base import Category, Detector, Postprocess
from spaces.detectors.faster_rcnn import FasterRCNN
from spaces.detectors.faster_rcnn_variants import DIGITS
from spaces.detectors.registry import make_detector
from spaces.detectors.yolox import YoloX
from spaces.effects import bits_by_layer, integers_by_layer
from spaces.layers import trace_layers
from spaces.methods.base import Draft
from spaces.recipe import Factorize, Prune, Quantize, Recipe
from spaces.testing import lively_network, noise, outputs_of

LEVELS = 63
"""Of weights, on every machine that runs these tests."""
DETECTORS: dict[str, Callable[[], Detector]] = {
    "yolox": lambda: YoloX("narrow", 3, (64, 64), depth=0.33, width=0.125),
    "yolox depthwise": lambda: YoloX("narrow", 3, (64, 64), depth=0.33, width=0.125, depthwise=True),
    "ssdlite": lambda: make_detector("ssdlite320_mobilenet_v3_large", 3, size=(64, 96)),
    "faster rcnn": lambda: FasterRCNN("fasterrcnn_digits", 3, (96, 96), DIGITS),
}


# -- grids


def test_a_grid_by_hand() -> None:
    grid = LearnedGrid.of([Range(-1.0, 2.0)], levels=4)  # steps of 1, zero point 1
    tensor = torch.tensor([[-3.0, -0.4, 0.6, 1.4, 9.0]], requires_grad=True)
    found = grid(tensor)
    assert found.tolist() == [[-1, 0, 1, 1, 2]]
    found.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]))
    assert tensor.grad is not None
    assert tensor.grad.tolist() == [[0, 2, 3, 4, 0]], "straight through, unless clipped"
    # Esser et al., equation 3: the clipped ends are -1 and 2 steps, others round(v) - v.
    steps = -1 * 1 + 2 * 0.4 + 3 * 0.4 + 4 * -0.4 + 5 * 2
    assert grid.factor.grad is not None
    assert grid.factor.grad.tolist() == pytest.approx([steps / math.sqrt(5 * 3)])


def test_a_grid_for_each_channel_by_hand() -> None:
    grid = LearnedGrid.of([Range(0.0, 255.0), Range(0.0, 2.55)], levels=256)
    tensor = torch.tensor([1.2, 1.234]).view(1, 2, 1, 1)
    assert grid(tensor).flatten().tolist() == pytest.approx([1.0, 1.23])
    with torch.no_grad():
        grid.factor[1] += math.log(2)
    assert grid.scales() == pytest.approx((1.0, 0.02))
    assert grid(tensor).flatten().tolist() == pytest.approx([1.0, 1.24])
    assert [span.high for span in grid.ranges()] == pytest.approx([255.0, 5.1])


def test_learned_ranges_have_the_very_scales_and_zero_points() -> None:
    random = np.random.default_rng(0)
    for levels in (4, 16, 256):
        spans = [Range(-float(low), float(high)) for low, high in random.uniform(0, 9, (50, 2))]
        grid = LearnedGrid.of(spans, levels)
        with torch.no_grad():
            grid.factor += torch.from_numpy(random.normal(size=50, scale=0.1))
        again = [span.grid(levels) for span in grid.ranges()]
        assert [zero for _, zero in again] == [int(zero) for zero in grid.zero]
        assert tuple(np.float32(scale) for scale, _ in again) == tuple(map(np.float32, grid.scales()))


# -- networks


def ranges_of(
    network: nn.Module, detector: Detector, target: Capabilities, every: int = 2
) -> dict[str, LayerRanges]:
    """All layers at 4 bits; one of `every` so many reads 16 levels."""
    layers = list(trace_layers(network, detector.preprocess.size))
    bits = {name: (4, 8 if k % every else 4) for k, name in enumerate(layers)}
    images = [noise(detector, 1, seed).numpy() for seed in range(4)]
    return calibrate(detector.simplified(network), bits, images, capabilities=target)


def faked(network: nn.Module, detector: Detector, target: Capabilities) -> FakeQuantized:
    ranges, image = ranges_of(network, detector, target), noise(detector, 1)
    return FakeQuantized(
        network, detector.simplified(network), ranges, image, target.writes_integers, weight_levels=LEVELS
    )


def trained(network: nn.Module, steps: int = 3, learning_rate: float = 0.02) -> None:
    """Steps on noise that change all there is, as `fine_tune` takes them."""
    optimizer = torch.optim.Adafactor(network.parameters(), lr=learning_rate, weight_decay=0.0)
    for _ in range(steps):
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape)
        optimizer.step()


def apart(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """Root mean square of the difference, in standard deviations of `theirs`."""
    pairs = list(zip(ours, theirs, strict=True))
    return max(float((a - b).square().mean().sqrt() / b.std()) for a, b in pairs)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", DETECTORS)
def test_every_layer_computes_what_its_rounded_form_computes(name: str, steps: int) -> None:
    """`round_layer` on the simplified network is the slow way; each layer is given what it read in training.

    (Given each its own, for one value in 10^5 lies so close to the middle of two levels that float32 decides
    which it goes to, and a network of 4 bits makes much of that.)
    """
    torch.manual_seed(0)
    detector = DETECTORS[name]()
    network = lively_network(detector)
    plain, images = copy.deepcopy(network), noise(detector, 2)
    fake = faked(network, detector, Capabilities(depthwise_by_channel=True))
    trained(network, steps)
    read, written = watched(network, fake)
    outputs_of(network, images)
    ranges = fake.removed()
    simplified = detector.simplified(network)
    rounded = copy.deepcopy(simplified)
    felt = []
    for layer, spans in ranges.items():
        one = rounded.get_submodule(layer)
        round_layer(one, spans, LEVELS)
        if one.weight.shape != network.get_submodule(layer).weight.shape:
            continue  # a focus stem reads the image itself once simplified
        with torch.no_grad():
            expected, without = one(read[layer]), simplified.get_submodule(layer)(read[layer])
        off = (written[layer] - expected).abs() > 1e-3 * expected.std()
        assert float(off.float().mean()) < 0.01, layer
        felt.append(float((written[layer] - without).std() / without.std()))
    assert np.median(felt) > 0.05
    assert len(felt) >= len(ranges) - 1
    assert network.state_dict().keys() == plain.state_dict().keys()
    assert same_state(network.state_dict(), plain.state_dict()) == (steps == 0)


def watched(network: nn.Module, fake: FakeQuantized) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What each layer reads before it is rounded, and what it writes with its norm, of the first call."""
    read: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}

    def note(kept: dict[str, Tensor], name: str, place: int) -> Callable[..., None]:
        def hook(*call: Any) -> None:  # module, inputs, and the output where there is one
            found = call[place][0] if isinstance(call[place], tuple) else call[place]
            kept.setdefault(name, found.clone())

        return hook

    for name in fake.layers:
        layer = network.get_submodule(name)
        layer.register_forward_pre_hook(note(read, name, 1), prepend=True)
        fake.writer(name).register_forward_hook(note(written, name, 2))
    return read, written


def test_a_whole_network_computes_what_rounded_layers_compute() -> None:
    torch.manual_seed(0)
    detector = DETECTORS["yolox"]()
    network, images = lively_network(detector), noise(detector, 2)
    fake = faked(network, detector, Capabilities(depthwise_by_channel=True))
    trained(network)
    ours = outputs_of(network, images)
    ranges = fake.removed()
    simplified = detector.simplified(network)
    rounded = copy.deepcopy(simplified)
    for layer, spans in ranges.items():
        round_layer(rounded.get_submodule(layer), spans, LEVELS)
    assert apart(ours, outputs_of(rounded, images)) < 0.02
    assert apart(ours, outputs_of(simplified, images)) > 0.2


def test_gradients_reach_weights_biases_and_scales() -> None:
    torch.manual_seed(0)
    detector = DETECTORS["yolox depthwise"]()
    network = lively_network(detector).requires_grad_(True)
    faked(network, detector, Capabilities(depthwise_by_channel=True, writes_integers=True))
    sum(output.square().sum() for output in network(noise(detector, 2))).backward()  # type: ignore[union-attr]
    grids = [module for module in network.modules() if isinstance(module, LearnedGrid)]
    assert len(grids) > 2 * len(list(trace_layers(lively_network(detector), detector.preprocess.size)))
    for parameter in network.parameters():
        assert parameter.grad is not None
        assert bool(torch.isfinite(parameter.grad).all())
        assert float(parameter.grad.abs().max()) > 0


def test_it_goes_on_from_what_was_learned() -> None:
    torch.manual_seed(0)
    detector = DETECTORS["yolox"]()
    network, images = lively_network(detector), noise(detector, 2)
    fake = faked(network, detector, Capabilities())
    trained(network)
    before = outputs_of(network, images)
    plain = json.loads(json.dumps({name: asdict(spans) for name, spans in fake.removed().items()}))
    ranges = {name: LayerRanges.from_plain(fields) for name, fields in plain.items()}
    again = FakeQuantized(network, detector.simplified(network), ranges, images[:1], weight_levels=LEVELS)
    assert all(torch.equal(a, b) for a, b in zip(outputs_of(network, images), before, strict=True))
    assert {name: asdict(spans) for name, spans in again.removed().items()} == {
        name: asdict(spans) for name, spans in ranges.items()
    }


def test_a_plain_copy_leaves_the_training_alone() -> None:
    torch.manual_seed(0)
    detector = DETECTORS["yolox depthwise"]()
    network, images = lively_network(detector), noise(detector, 2)
    fake = faked(network, detector, Capabilities(depthwise_by_channel=True, writes_integers=True))
    trained(network)
    before, parameters = outputs_of(network, images), list(map(id, network.parameters()))
    again, ranges = fake.plain_copy()
    assert not any(isinstance(module, LearnedGrid) for module in again.modules())
    assert all(torch.equal(a, b) for a, b in zip(outputs_of(network, images), before, strict=True))
    assert set(map(id, network.parameters())) == set(parameters), "the optimiser still has all of them"
    state = copy.deepcopy(network.state_dict())
    trained(network)
    network.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(outputs_of(network, images), before, strict=True))
    assert fake.removed() == ranges
    assert same_state(again.state_dict(), network.state_dict())
    assert list(again.state_dict()) == list(lively_network(detector).state_dict())


def test_nothing_to_round_changes_nothing() -> None:
    detector = DETECTORS["yolox"]()
    network, images = lively_network(detector), noise(detector, 1)
    before, state = outputs_of(network, images), copy.deepcopy(network.state_dict())
    fake = FakeQuantized(network, detector.simplified(network), {}, images)
    fake.correct_biases(detector.simplified(network), images)
    assert all(torch.equal(a, b) for a, b in zip(outputs_of(network, images), before, strict=True))
    assert fake.removed() == {}
    assert same_state(network.state_dict(), state)


def test_it_begins_where_post_training_quantisation_ends() -> None:
    """Corrected biases are those of the simplified network, whether a norm or the layer has them."""
    torch.manual_seed(0)
    detector = DETECTORS["yolox"]()
    network, images = lively_network(detector), noise(detector, 4)
    simplified = detector.simplified(network)
    fake = faked(network, detector, Capabilities())
    fake.correct_biases(simplified, images)
    fake.removed()
    ours = detector.simplified(network)
    for name in trace_layers(network, detector.preprocess.size):
        expected, found = (n.get_submodule(name).bias for n in (simplified, ours))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_the_exported_file_computes_what_was_trained(
    engine: str,
    digits_base: nn.Module,
    digits_detector: Detector,
    fit_images: LetterboxedImages,
    tmp_path: Path,
) -> None:
    """Raw outputs in the engine's own int8 kernels, against those of the network in training.

    In shares of the outputs' own spread. ONNX Runtime rounds biases and what layers write, too, and values
    that lie in the middle of two levels go either way.
    """
    torch.manual_seed(0)
    target, network = target_named(engine), copy.deepcopy(digits_base)
    images = batch_of(fit_images, digits_detector, np.arange(4), False)
    layers = trace_layers(network, digits_detector.preprocess.size)
    simplified = digits_detector.simplified(network)
    batches = [image[None].numpy() for image in images]
    ranges = calibrate(simplified, dict.fromkeys(layers, (3, 8)), batches, capabilities=target.capabilities)
    ranges = as_exported(ranges, whole(network, digits_detector))
    writes = target.capabilities.writes_integers
    fake = FakeQuantized(network, simplified, ranges, images[:1], writes)
    trained(network, learning_rate=0.001)
    aware = outputs_of(network, images[:1])
    learned = fake.removed()
    written = target.write(whole(network, digits_detector), dict.fromkeys(learned, 8), learned, tmp_path)
    kernels = target.prepare(written.model, 1, written.hint).kernels()
    assert set(kernels.values()) == {"i8"}
    found = raw_outputs(engine, written.model, batches[0])
    assert [o.shape for o in found] == [o.shape for o in aware]
    off, felt = apart(found, aware), apart(outputs_of(network, images[:1]), aware)
    assert off < {"openvino": 0.01, "onnxruntime": 0.1}[engine]
    assert felt > 0.4, "rounding must be felt, or this shows nothing"


def whole(network: nn.Module, detector: Detector) -> WholeDetector:
    categories = [Category(k, str(k)) for k in range(detector.num_classes)]
    return WholeDetector(detector.simplified(network), detector, Postprocess(), categories).eval()


def raw_outputs(engine: str, model: Path, image: NDArray[np.float32]) -> tuple[Tensor, ...]:
    """Of the file, largest maps first."""
    part = tensor_part(onnx.load(model)).SerializeToString()
    if engine == "openvino":
        core = ov.Core()
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        found = list(core.compile_model(core.read_model(part), "CPU", settings)([image]).values())
    else:
        found = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"]).run(
            None, {"images": image}
        )
    return tuple(torch.from_numpy(o.copy()) for o in sorted(found, key=lambda o: -o.size))


# -- trials


@pytest.fixture(scope="module")
def worker(make_worker: Callable[..., CandidateWorker]) -> CandidateWorker:
    return make_worker(size=(96, 96), importance="magnitude")


def quantized_to(worker: CandidateWorker, weight: int, activation: int, *others: Any) -> Recipe:
    layers = [
        Quantize(site=site, weight_bits=weight, activation_bits=activation)
        for site in worker.bench.sites.layer
    ]
    return Recipe(detector="yolox_digits", choices=(*layers, *others))


def test_who_rounds_in_training(worker: CandidateWorker) -> None:
    bench, sites = worker.bench, worker.bench.sites
    pruned = Recipe(detector="yolox_digits", choices=(Prune(site=next(iter(sites.channel)), sparsity=0.5),))
    recipes = [
        pruned,
        *(quantized_to(worker, *bits) for bits in ((32, 32), (16, 16), (8, 8), (4, 8), (4, 4))),
    ]
    expected = {"auto": [0, 0, 0, 0, 1, 1], True: [0, 0, 0, 1, 1, 1], False: [0] * 6}
    for awareness, answers in expected.items():
        plan = FineTunePlan(quantization_aware=awareness)  # type: ignore[arg-type]
        found = [rounds_in_training(plan, integers_by_layer(recipe, sites)) for recipe in recipes]
        assert found == [bool(answer) for answer in answers]
    never = FineTunePlan(quantization_aware=True, epochs=0)
    assert not rounds_in_training(never, integers_by_layer(recipes[-1], bench.sites))


def test_a_trial_from_4_bits_to_the_file_and_back(worker: CandidateWorker, tmp_path: Path) -> None:
    bench = worker.bench
    sites = bench.sites
    pruned = next(name for name in sites.channel if "dark5.0" in name)
    recipe = quantized_to(
        worker,
        4,
        8,
        Prune(site=pruned, sparsity=0.25),
        Factorize(site="backbone.backbone.dark5", rank_ratio=0.5),
    )
    reports = list(worker.run(Job(kind="trial", name="trial 1", number=1, recipe=recipe, seed=1)))
    assert [report.stage for report in reports] == [
        "compress", "calibrate", "teacher", "fine-tune 1/1", "export", "score", "latency", "done",
    ]  # fmt: skip
    evaluation = Evaluation.model_validate(reports[-1].result)
    assert evaluation.artifact is not None
    assert evaluation.details["kernels"].keys() == {"i8"}
    model = Path(evaluation.artifact)
    found, draft = rebuild(bench.detector.build().eval(), model.parent)
    assert draft.factors
    assert {f"{layer}.0" for layer in draft.factors} <= draft.learned.keys()
    assert all(fields["largest"] == 7 for fields in draft.learned.values())
    assert not any(isinstance(module, LearnedGrid) for module in draft.network.modules())
    again, _ = bench.export(draft.network, bits_by_layer(found, sites), found, tmp_path, draft.learned)
    assert again.read_bytes() == model.read_bytes()


def test_an_interrupted_trial_goes_on_rounding(make_worker: Callable[..., CandidateWorker]) -> None:
    plan = FineTunePlan(epochs=2, batch_size=5, mirror=False)
    worker = make_worker(size=(96, 96), importance="magnitude", finetune=plan)
    choices = tuple(c for c in quantized_to(worker, 3, 8).choices if "dark5" in c.site)
    recipe = Recipe(detector="yolox_digits", choices=choices)

    def job(number: int, rungs: list[int]) -> Job:
        payload = {"rungs": rungs}
        return Job(kind="trial", name="trial", number=number, recipe=recipe, seed=1, payload=payload)

    def rebuilt(number: int) -> Draft:
        folder = worker.artifacts / f"trial-{number:05d}"
        return rebuild(worker.bench.detector.build(), folder)[1]

    assert list(worker.run(job(1, [])))[-1].stage == "done"
    steps = worker.run(job(2, [0, 1]))
    rungs = [report.rung for report in itertools.takewhile(lambda r: r.stage != "fine-tune 2/2", steps)]
    steps.close()  # type: ignore[attr-defined]
    assert [rung.epochs for rung in rungs if rung is not None] == [0, 1]
    again = list(worker.run(job(2, [0, 1])))
    assert "go on after rung 1" in [report.stage for report in again]
    straight, interrupted = rebuilt(1), rebuilt(2)
    assert same_state(straight.network.state_dict(), interrupted.network.state_dict())
    assert straight.learned == interrupted.learned
