"""Faster R-CNN as a file: the whole detector in both engines against torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from evaluators.calibration import calibrate
from evaluators.export import export_graph
from evaluators.exported import write_graph
from evaluators.graph import layer_of
from evaluators.postprocess import WholeDetector
from evaluators.targets.onnx_target import OnnxTarget
from evaluators.targets.registry import target_named
from evaluators.torch_session import TorchSession
from spaces.detectors.base import Category, Postprocess
from spaces.detectors.faster_rcnn import FasterRCNN
from spaces.detectors.faster_rcnn_variants import DIGITS
from spaces.layers import trace_layers
from spaces.testing import lively_network, noise

DETECTOR = FasterRCNN("fasterrcnn_digits", 3, (96, 96), DIGITS)
CATEGORIES = [Category(7, "a"), Category(3, "b"), Category(90, "c")]
RULES = Postprocess(nms_iou=0.5, max_detections=20)


@cache
def network() -> nn.Module:
    """Not to be changed."""
    return lively_network(DETECTOR)


@cache
def graph() -> onnx.ModelProto:
    return export_graph(network(), DETECTOR, RULES, CATEGORIES)


def written(target: str, plain: onnx.ModelProto, folder: Path) -> Path:
    """The float32 file for a target."""
    engine = target_named(target)
    assert isinstance(engine, OnnxTarget)
    return write_graph(engine.lower(plain, {}, {}).graph, folder)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_the_file_finds_what_torch_finds(target: str, tmp_path: Path) -> None:
    """Of each image the detections that torch scores highest; two of equal scores may change places."""
    session = target_named(target).prepare(written(target, graph(), tmp_path), 1, "f32")
    whole = TorchSession(WholeDetector(DETECTOR.simplified(network()), DETECTOR, RULES, CATEGORIES))
    for images in (noise(DETECTOR, 1, 0), noise(DETECTOR, 1, 1), torch.zeros(1, 3, 96, 96)):
        found, expected = session.run(images.numpy()), whole.run(images.numpy())
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)
        for box, label in zip(expected.boxes[:10], expected.labels[:10], strict=True):
            same = found.boxes[found.labels == label]
            assert np.abs(same - box).max(axis=1).min() < 0.05  # pixels
        assert len(expected.scores) >= 10


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_every_layer_runs_in_int8_the_box_head_too(target: str, tmp_path: Path) -> None:
    engine, layers = target_named(target), list(trace_layers(network(), DETECTOR.preprocess.size))
    assert {type(network().get_submodule(layer)) for layer in layers} == {nn.Conv2d, nn.Linear}
    simplified = DETECTOR.simplified(network())
    images = [noise(DETECTOR, 1, seed).numpy() for seed in range(2)]
    ranges = calibrate(simplified, layers, images, capabilities=engine.capabilities)
    whole = WholeDetector(simplified, DETECTOR, RULES, CATEGORIES).eval()
    reference = TorchSession(whole).run(images[0])
    for width, kernel in ((32, "f32"), (8, "i8")):
        model = engine.write(whole, dict.fromkeys(layers, width), ranges, tmp_path / str(width)).model
        session = engine.prepare(model, 1)
        assert session.kernels() == dict.fromkeys(layers, kernel)
        found = session.run(images[0])
        assert np.abs(found.scores[:10] - reference.scores[:10]).mean() < 0.06


def test_an_image_without_proposals_gives_no_detections(tmp_path: Path) -> None:
    silent = lively_network(DETECTOR)
    silent.score_threshold = 0.5
    with torch.no_grad():
        silent.rpn.head.cls_logits.bias.fill_(-100.0)
    plain = export_graph(silent, DETECTOR, RULES, CATEGORIES)
    for target in ("onnxruntime", "openvino"):
        model = written(target, plain, tmp_path / target)
        found = target_named(target).prepare(model, 1, "f32").run(noise(DETECTOR, 1).numpy())
        assert (found.boxes.shape, found.scores.shape, found.labels.shape) == ((0, 4), (0,), (0,))


def test_the_graph_has_two_suppressions_one_alignment_and_no_loop() -> None:
    kinds = [node.op_type for node in graph().graph.node]
    assert (kinds.count("NonMaxSuppression"), kinds.count("RoiAlign")) == (2, 1)
    assert not {"Loop", "If", "Scan"} & set(kinds)
    named = {layer_of(node) for node in graph().graph.node}
    assert {"roi_heads.box_head.fc6", "roi_heads.box_predictor.cls_score", "rpn.head.conv.0.0"} <= named
