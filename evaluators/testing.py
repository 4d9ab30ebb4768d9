"""The contract test of targets, shipped so that a target of one's own can be held to it.

class TestMyTarget(TargetContract):
    @pytest.fixture
    def target(self) -> Target:
        return MyTarget()
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from evaluators.calibration import INT8, LayerRanges, calibrate
from evaluators.export import export_graph
from evaluators.kernels import fell_back, unseen
from evaluators.postprocess import WholeDetector
from evaluators.signature import machine_signature
from evaluators.targets.base import Detections, Session, Target
from evaluators.torch_session import TorchSession
from spaces.capabilities import Capabilities
from spaces.detectors.base import Category, Postprocess
from spaces.detectors.yolox import YoloX
from spaces.errors import InputError
from spaces.layers import trace_layers
from spaces.testing import lively_network, noise, outputs_of

CATEGORIES = (Category(7, "a"), Category(3, "b"), Category(90, "c"))
ISA = {16: {"avx512_bf16", "amx_bf16", "bf16"}}
"""Instruction sets of which one must be there before kernels of a bit-width can be asked for."""
SCORE_DRIFT = {32: 1e-4, 16: 0.03, 8: 0.06}
"""How far the 20 best scores may lie from those of torch in float32, on average. (They lie 0.11 apart from
one image of noise to another, and untrained networks feel rounding more than trained ones.)"""


class TargetContract:
    """Override the fixture `target`."""

    @pytest.fixture
    def target(self) -> Target:
        """The target under test."""
        raise NotImplementedError("override the fixture `target`")

    def test_capabilities_are_widest_first(self, target: Target) -> None:
        widths = target.capabilities.bit_widths
        assert isinstance(target, Target)
        assert widths[0] == 32
        assert list(widths) == sorted(set(widths), reverse=True)
        assert target.capabilities.channel_granule >= 1

    def test_signature_says_what_latencies_depend_on(self, target: Target) -> None:
        signature = target.signature(2)
        name, version = str(signature["engine"]).split(" ", 1)
        assert name
        assert version[0].isdigit()
        assert signature["threads"] == 2
        assert machine_signature().items() <= signature.items()
        assert json.loads(json.dumps(signature)) == signature

    def test_float32_agrees_with_torch(self, target: Target, tmp_path: Path) -> None:
        """Boxes within 0.01 pixels, scores within 1e-4, the same labels in the same order."""
        session, reference = loaded(target, 32, tmp_path), torch_session()
        for image in images(2):
            ours, theirs = session.run(image), reference.run(image)
            assert len(theirs.scores) > 5
            np.testing.assert_allclose(ours.scores, theirs.scores, rtol=0, atol=1e-4)
            np.testing.assert_allclose(ours.boxes, theirs.boxes, rtol=0, atol=0.01)
            np.testing.assert_array_equal(ours.labels, theirs.labels)

    def test_every_bit_width_runs_in_kernels_of_its_own(self, target: Target, tmp_path: Path) -> None:
        for width in target.capabilities.bit_widths:
            kernels = loaded(target, width, tmp_path / str(width)).kernels()
            bits = dict.fromkeys(layers(), width)
            if width == 32:
                assert set(kernels.values()) == {"f32"}, "float32 must not silently run in less"
            if can_run(width):
                assert fell_back(bits, kernels, target.capabilities.bit_widths) == {}
                assert len(unseen(bits, kernels)) <= 0.1 * len(bits)

    def test_every_bit_width_finds_what_float32_finds(self, target: Target, tmp_path: Path) -> None:
        reference = torch_session()
        for width in target.capabilities.bit_widths:
            session = loaded(target, width, tmp_path / str(width))
            drifts = []
            for image in images(4):
                found, expected = session.run(image), reference.run(image)
                check_detections(found)
                assert len(found.scores) == len(expected.scores) > 20
                drifts.append(np.abs(found.scores[:20] - expected.scores[:20]).mean())
            assert float(np.mean(drifts)) < SCORE_DRIFT[width]

    def test_layers_of_several_bit_widths_share_a_file(self, target: Target, tmp_path: Path) -> None:
        widths = target.capabilities.bit_widths
        bits = {layer: widths[k % len(widths)] for k, layer in enumerate(layers())}
        session = lowered(target, bits, tmp_path)
        check_detections(session.run(images(1)[0]))
        asked = {layer: width for layer, width in bits.items() if can_run(width)}
        kernels = session.kernels()
        assert fell_back(asked, kernels, widths) == {}
        assert len(unseen(asked, kernels)) <= 0.1 * len(asked)

    def test_blank_images_and_images_without_detections(self, target: Target, tmp_path: Path) -> None:
        session, strict = loaded(target, 32, tmp_path / "all"), tmp_path / "none"
        blank = np.zeros_like(images(1)[0])
        for value in (0, DETECTOR.preprocess.pad_value, 255):
            check_detections(session.run(blank + np.float32(value)))
        nothing = lowered(target, dict.fromkeys(layers(), 32), strict, Postprocess(score_threshold=0.999))
        found = nothing.run(blank)
        check_detections(found)
        assert len(found.scores) == 0
        assert len(session.run(images(1)[0]).scores) > 0

    def test_writing_leaves_the_detector_alone(self, target: Target, tmp_path: Path) -> None:
        detector = whole(Postprocess())
        before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
        expected = TorchSession(detector).run(images(1)[0])
        for width in target.capabilities.bit_widths:
            spans = ranges(target.capabilities)
            written = target.write(detector, dict.fromkeys(layers(), width), spans, tmp_path)
            assert written.model == tmp_path / target.model_file
            assert written.model.is_file()
        after = detector.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        found = TorchSession(detector).run(images(1)[0])
        np.testing.assert_array_equal(found.scores, expected.scores)

    def test_the_tensor_part_is_the_network_alone(self, target: Target, tmp_path: Path) -> None:
        """It gives as many numbers as the network, at every bit-width; of detections there are fewer."""
        raw = outputs_of(network(), torch.from_numpy(images(1)[0]))
        for width in target.capabilities.bit_widths:
            bits, spans = dict.fromkeys(layers(), width), ranges(target.capabilities)
            written = target.write(whole(Postprocess()), bits, spans, tmp_path / str(width))
            found: Any = target.prepare_tensor_part(written.model, 1, written.hint).run(images(1)[0])
            arrays = found.values() if isinstance(found, Mapping) else found
            assert sum(int(np.prod(one.shape)) for one in arrays) == sum(one.numel() for one in raw)

    def test_runs_repeat_and_results_are_the_callers_own(self, target: Target, tmp_path: Path) -> None:
        session, (first, second) = loaded(target, 32, tmp_path), images(2)
        kept = session.run(first)
        scores = kept.scores.copy()
        session.run(second)
        np.testing.assert_array_equal(kept.scores, scores)
        np.testing.assert_array_equal(session.run(first).scores, scores)

    def test_missing_and_broken_files_are_refused_in_one_line(self, target: Target, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no such file"):
            target.prepare(tmp_path / "nowhere.onnx", 1)
        garbage = tmp_path / "garbage.onnx"
        for content in (b"", b"no model" * 100):
            garbage.write_bytes(content)
            with pytest.raises(InputError, match="cannot load it") as caught:
                target.prepare(garbage, 1)
            assert "\n" not in str(caught.value)


# -- a small detector whose untrained network finds boxes in noise

DETECTOR = YoloX("contract", len(CATEGORIES), (64, 96), depth=0.33, width=0.125)


def can_run(width: int) -> bool:
    """True where this CPU has the instructions that kernels of a bit-width need."""
    return width not in ISA or bool(ISA[width] & set(machine_signature()["isa"]))


def check_detections(found: Detections) -> None:
    """Shapes, types, order and values that every session must deliver."""
    count = len(found.scores)
    assert [a.shape for a in (found.boxes, found.scores, found.labels)] == [(count, 4), (count,), (count,)]
    assert [str(a.dtype) for a in (found.boxes, found.scores, found.labels)] == [
        "float32",
        "float32",
        "int64",
    ]
    height, width = DETECTOR.preprocess.size
    assert np.isfinite(found.boxes).all()
    assert (found.boxes >= 0).all()
    assert (found.boxes <= [width, height, width, height]).all()
    assert ((found.scores >= 0) & (found.scores <= 1)).all()
    assert (np.diff(found.scores) <= 0).all()
    assert set(found.labels.tolist()) <= {category.id for category in CATEGORIES}


def loaded(target: Target, width: int, directory: Path) -> Session:
    """The detector with all layers at one bit-width."""
    return lowered(target, dict.fromkeys(layers(), width), directory)


def lowered(
    target: Target, bits: Mapping[str, int], directory: Path, postprocess: Postprocess | None = None
) -> Session:
    """The detector with each layer at a bit-width of its own, written to a file and loaded."""
    spans = ranges(target.capabilities)
    written = target.write(whole(postprocess or Postprocess()), bits, spans, directory)
    return target.prepare(written.model, 1, written.hint)


@cache
def network() -> nn.Module:
    """The float32 network; not to be changed."""
    return lively_network(DETECTOR)


@cache
def layers() -> tuple[str, ...]:
    """All of its layers, in order of execution."""
    return tuple(trace_layers(network(), DETECTOR.preprocess.size))


@cache
def example_graph(postprocess: Postprocess) -> onnx.ModelProto:
    """The exported detector; not to be changed."""
    return export_graph(network(), DETECTOR, postprocess, CATEGORIES)


@cache
def ranges(capabilities: Capabilities = INT8) -> dict[str, LayerRanges]:
    """Ranges of all layers on a few images, as a target wants them."""
    return calibrate(DETECTOR.simplified(network()), layers(), images(4), capabilities=capabilities)


def images(count: int) -> Sequence[NDArray[np.float32]]:
    """`count` images `(1, 3, H, W)` of noise."""
    return [noise(DETECTOR, 1, seed).numpy() for seed in range(count)]


def whole(postprocess: Postprocess) -> WholeDetector:
    """The detector ready for inference."""
    return WholeDetector(DETECTOR.simplified(network()), DETECTOR, postprocess, CATEGORIES).eval()


def torch_session() -> TorchSession:
    """The reference."""
    return TorchSession(WholeDetector(network(), DETECTOR, Postprocess(), CATEGORIES))
