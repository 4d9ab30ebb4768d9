"""The contract test of detectors, which ships with the package. That of methods: `spaces.methods.testing`.

Derive a class in a test module, override the fixture, and pytest runs the contract:

    class TestMyDetector(DetectorContract):
        @pytest.fixture
        def detector(self) -> Detector:
            return MyDetector("mine", num_classes=3, size=(64, 64))

A small input size keeps it fast.
"""

from __future__ import annotations

import io
import warnings

import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from spaces.apply import apply, same_state
from spaces.best_boxes import best_decoded
from spaces.capabilities import Capabilities
from spaces.cuts import that_hold
from spaces.detectors.base import Detector, Labels, Outputs
from spaces.layers import is_layer, trace_layers
from spaces.methods.prune import Pruning
from spaces.recipe import Recipe
from spaces.sites import find_sites


def noise(detector: Detector, count: int, seed: int = 0) -> Tensor:
    """Images `(count, 3, H, W)` of uniform noise that fills what the preprocessing leaves of 0..255."""
    rules = detector.preprocess
    pixels = torch.rand(count, 3, *rules.size, generator=torch.Generator().manual_seed(seed)) * 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (rules.mean, rules.std))
    return (pixels * rules.scale - mean) / std


def lively_network(detector: Detector, seed: int = 0) -> nn.Module:
    """A network in evaluation mode that answers noise as a trained one answers photographs.

    BatchNorm has statistics, scales and shifts of its own, and each channel of the output layers spreads
    by 1 around 0, so that scores differ and boxes are found without any training.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = detector.build()
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
            if isinstance(norm.weight, nn.Parameter):
                nn.init.uniform_(norm.weight, 0.5, 1.5)
            if isinstance(norm.bias, nn.Parameter):
                nn.init.normal_(norm.bias, std=0.2)
    produced: dict[str, list[Tensor]] = {name: [] for name in detector.output_layers(network)}
    handles = [
        network.get_submodule(name).register_forward_hook(lambda *call, kept=kept: kept.append(call[2]))
        for name, kept in produced.items()
    ]
    images = noise(detector, 8, seed)
    with torch.no_grad():
        network.train()(images)
        for kept in produced.values():
            kept.clear()
        network.eval()(images)
        for name, kept in produced.items():
            layer = network.get_submodule(name)
            axis = -1 if isinstance(layer, nn.Linear) else -3  # of the channels
            rows = torch.cat([t.movedim(axis, 0).flatten(1) for t in kept], dim=1)
            assert isinstance(layer.weight, nn.Parameter)
            spread = rows.std(dim=1).clamp_min(1e-6)
            layer.weight.div_(spread.view(-1, *(1,) * (layer.weight.dim() - 1)))
            if isinstance(layer.bias, nn.Parameter):
                nn.init.zeros_(layer.bias)
    for handle in handles:
        handle.remove()
    return network


class DetectorContract:
    """Override the fixture `detector`."""

    @pytest.fixture
    def detector(self) -> Detector:
        """The detector under test, at a small input size."""
        raise NotImplementedError("override the fixture `detector`")

    def test_it_is_a_detector_and_builds_in_training_mode(self, detector: Detector) -> None:
        assert isinstance(detector, Detector)
        assert detector.name
        assert detector.num_classes >= 1
        assert detector.build().training

    def test_raw_outputs_have_the_same_shapes_in_both_modes(self, detector: Detector) -> None:
        network, images = detector.build(), noise(detector, 2)
        with torch.no_grad():
            training, serving = network.train()(images), network.eval()(images)
        assert isinstance(training, tuple)
        assert isinstance(serving, tuple)
        assert [o.shape for o in training] == [o.shape for o in serving]
        assert all(o.dtype == torch.float32 and len(o) == 2 for o in serving)

    def test_images_of_a_batch_do_not_touch_each_other(self, detector: Detector) -> None:
        network, images = lively_network(detector), noise(detector, 2)
        both = outputs_of(network, images)
        for k in range(2):
            for alone, together in zip(outputs_of(network, images[k : k + 1]), both, strict=True):
                torch.testing.assert_close(alone[0], together[k], rtol=1e-3, atol=1e-3)

    def test_loss_is_finite_with_and_without_boxes(self, detector: Detector) -> None:
        network, images = lively_network(detector), noise(detector, 2)
        for labels in (_labels(detector, 3), _labels(detector, 0)):
            network.zero_grad()
            loss = detector.loss(network(images), [labels, _labels(detector, 0)])
            loss.backward()  # type: ignore[no-untyped-call]
            gradients = [p.grad for p in network.parameters() if p.grad is not None]
            assert loss.shape == ()
            assert bool(torch.isfinite(loss))
            assert all(bool(torch.isfinite(g).all()) for g in gradients)
            assert any(bool(g.any()) for g in gradients)

    def test_loss_does_not_depend_on_the_size_of_the_batch(self, detector: Detector) -> None:
        outputs = outputs_of(lively_network(detector), noise(detector, 1))
        labels, twice = _labels(detector, 3), tuple(torch.cat((o, o)) for o in outputs)
        single, double = detector.loss(outputs, [labels]), detector.loss(twice, [labels, labels])
        torch.testing.assert_close(double, single, rtol=1e-4, atol=1e-4)

    def test_distillation_is_0_where_outputs_agree_and_more_elsewhere(self, detector: Detector) -> None:
        images = noise(detector, 2)
        teacher, student = outputs_of(lively_network(detector), images), lively_network(detector, seed=1)
        assert float(detector.distillation(teacher, teacher)) == pytest.approx(0.0, abs=1e-4)
        distance = detector.distillation(student(images), teacher)
        distance.backward()  # type: ignore[no-untyped-call]
        assert distance.shape == ()
        assert 0.01 < float(distance.detach()) < float("inf")
        assert any(p.grad is not None and bool(p.grad.any()) for p in student.parameters())

    def test_decode_gives_boxes_and_scores(self, detector: Detector) -> None:
        boxes, scores = detector.decode(outputs_of(lively_network(detector), noise(detector, 2)))
        count = boxes.shape[1]
        assert boxes.shape in {(2, count, 4), (2, count, detector.num_classes, 4)}
        assert boxes.dim() == 3 or getattr(detector, "multi_label", False)
        assert scores.shape == (2, count, detector.num_classes)
        assert bool(torch.isfinite(boxes).all())
        assert bool((boxes[..., 2:] >= boxes[..., :2]).all())
        assert bool(((scores >= 0) & (scores <= 1)).all())
        assert float(scores.max() - scores.min()) > 0.1

    @pytest.mark.parametrize("limit", [1, 7, 10**6])
    def test_its_own_best_boxes_are_those_of_decode(self, detector: Detector, limit: int) -> None:
        own = getattr(detector, "best_boxes", None)
        if own is None:
            return  # nothing is promised
        outputs = outputs_of(lively_network(detector), noise(detector, 1))
        for ours, plain in zip(own(outputs, limit), best_decoded(detector, outputs, limit), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3)

    def test_output_layers_are_layers(self, detector: Detector) -> None:
        network = detector.build()
        names = detector.output_layers(network)
        assert names
        assert all(is_layer(network.get_submodule(name)) for name in names)

    def test_every_layer_has_a_block_in_one_stage(self, detector: Detector) -> None:
        layers = trace_layers(detector.build(), detector.preprocess.size)
        stages: dict[str, set[str]] = {}
        for layer in layers:
            stages.setdefault(detector.block_of(layer), set()).add(detector.stage_of(layer))
        assert all(block and all(found) and len(found) == 1 for block, found in stages.items())
        assert 1 < len(set.union(*stages.values())) <= len(stages) < len(layers)

    def test_simplified_agrees_keeps_names_and_copies(self, detector: Detector) -> None:
        network, images = lively_network(detector), noise(detector, 2)
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        simple = detector.simplified(network)
        assert not simple.training
        assert same_state(network.state_dict(), before)
        for ours, plain in zip(outputs_of(simple, images), outputs_of(network, images), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-3, atol=2e-3)
        size = detector.preprocess.size
        assert trace_layers(simple, size).keys() == trace_layers(network, size).keys()

    def test_sites_are_found_and_leave_output_layers_alone(self, detector: Detector) -> None:
        network = detector.build()
        sites, fixed = find_sites(detector, network), detector.output_layers(network)
        assert sites.channel
        assert {layer for site in sites.layer.values() for layer in site.layers} == set(sites.facts)
        for site in sites.channel.values():
            assert not any(m.side == "out" and m.layer in fixed for m in site.members)

    def test_every_site_loses_channels_by_itself_and_nothing_else_changes(self, detector: Detector) -> None:
        """Sites shrink unequally, and what is left computes what it did, so channels are paired rightly."""
        network = lively_network(detector)
        found = find_sites(detector, network).channel
        wrong = sorted(found.keys() - that_hold(network, found, detector.preprocess.size, seed=1).keys())
        assert not wrong, f"cannot lose channels by themselves: {', '.join(wrong)}"

    def test_a_pruned_network_serves_and_exports(self, detector: Detector) -> None:
        network, images = lively_network(detector), noise(detector, 1)
        sites = find_sites(detector, network)
        offered = Pruning().options(sites, Capabilities(channel_granule=1)).values()
        choices = tuple(some[1 + k % (len(some) - 1)] for k, some in enumerate(offered))  # all unequal
        whole = outputs_of(network, images)
        for chosen in (choices[:1], choices):
            recipe = Recipe(detector=detector.name, choices=chosen)
            pruned = apply(network, recipe, sites).network
            assert [o.shape for o in outputs_of(pruned, images)] == [o.shape for o in whole]
            decoding = _Decoding(detector.simplified(pruned), detector)
            with torch.no_grad():
                boxes, scores = decoding(images)
            served_boxes, served_scores = _served(decoding, images)
            torch.testing.assert_close(served_scores, scores, rtol=0, atol=1e-3)
            torch.testing.assert_close(served_boxes, boxes, rtol=1e-3, atol=0.05)  # pixels


class _Decoding(nn.Module):
    """Images to boxes and scores, as it is exported."""

    def __init__(self, network: nn.Module, detector: Detector) -> None:
        super().__init__()
        self.network, self.detector = network, detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.detector.decode(self.network(images))


def outputs_of(network: nn.Module, images: Tensor) -> Outputs:
    """Raw outputs, without gradients."""
    with torch.no_grad():
        outputs: Outputs = network(images)
    return outputs


def _labels(detector: Detector, count: int) -> Labels:
    """Boxes of growing size along the diagonal, classes in turn."""
    height, width = detector.preprocess.size
    steps = torch.arange(count, dtype=torch.float32)
    corner = torch.stack((steps * width / 8, steps * height / 8), dim=1)
    extent = torch.stack(((steps + 2) * width / 8, (steps + 2) * height / 8), dim=1)
    return Labels(torch.cat((corner, corner + extent), dim=1), torch.arange(count) % detector.num_classes)


def _served(module: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What ONNX Runtime makes of the exported module."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecation, and shapes that are constant here
        torch.onnx.export(
            module.eval(),
            (images,),
            file,  # type: ignore[arg-type]  # takes streams, its annotation does not say so
            dynamo=False,
            opset_version=17,
            input_names=["images"],
        )
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    session = ort.InferenceSession(file.getvalue(), settings, providers=["CPUExecutionProvider"])
    boxes, scores = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(boxes), torch.from_numpy(scores)
