"""Ultralytics' networks as files: whole detectors in both engines against torch, pruned and in int8."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from evaluators.calibration import calibrate
from evaluators.export import export_graph
from evaluators.exported import write_graph
from evaluators.graph import layer_of
from evaluators.postprocess import WholeDetector
from evaluators.targets.onnx_target import OnnxTarget
from evaluators.targets.registry import target_named
from evaluators.torch_session import TorchSession
from spaces.apply import apply
from spaces.detectors.base import Category, postprocess_of
from spaces.detectors.registry import make_detector
from spaces.layers import trace_layers
from spaces.recipe import Prune, Recipe
from spaces.sites import find_sites
from spaces.testing import lively_network, noise

if importlib.util.find_spec("ultralytics") is None:
    pytest.skip("ultralytics is not installed: pip install -e '.[ultralytics]'", allow_module_level=True)

CATEGORIES = [Category(7, "a"), Category(3, "b"), Category(90, "c")]
SMALLEST = ["yolov8n", "yolo11n", "yolo26n"]
SIZE = (64, 96)


@pytest.mark.parametrize("name", SMALLEST)
def test_pruned_files_find_what_torch_finds(name: str, tmp_path: Path) -> None:
    detector = make_detector(name, 3, SIZE)
    network = lively_network(detector)
    sites = find_sites(detector, network)
    choices = tuple(Prune(site=site, sparsity=0.5) for site in sites.channel)
    pruned = apply(network, Recipe(detector=name, choices=choices), sites).network
    rules = postprocess_of(detector)
    graph = export_graph(pruned, detector, rules, CATEGORIES)
    onnx.checker.check_model(graph)
    assert {layer_of(node) for node in graph.graph.node} - {None} == set(sites.facts)
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("NonMaxSuppression") == (0 if name == "yolo26n" else 1)
    whole = TorchSession(WholeDetector(detector.simplified(pruned), detector, rules, CATEGORIES))
    for target in ("onnxruntime", "openvino"):
        engine = target_named(target)
        assert isinstance(engine, OnnxTarget)
        file = write_graph(engine.lower(graph, {}, {}).graph, tmp_path / target)
        session = engine.prepare(file, 1, "f32")
        for images in (noise(detector, 1), torch.zeros(1, 3, *SIZE)):
            found, expected = session.run(images.numpy()), whole.run(images.numpy())
            assert len(expected.scores) > 0
            np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)
            for box, label in zip(expected.boxes[:10], expected.labels[:10], strict=True):
                same = found.boxes[found.labels == label]
                assert np.abs(same - box).max(axis=1).min() < 0.05  # pixels


@pytest.mark.parametrize("name", SMALLEST)
def test_narrow_files_stay_close(name: str, tmp_path: Path) -> None:
    """All layers at 8 bits, or 16: the 10 best scores of an image lie within 0.1 of torch's on average."""
    detector = make_detector(name, 3, SIZE)
    network = lively_network(detector)
    rules = postprocess_of(detector)
    layers = tuple(trace_layers(network, SIZE))
    simple = detector.simplified(network)
    ranges = calibrate(simple, layers, [noise(detector, 1, seed).numpy() for seed in range(4)])
    whole = WholeDetector(simple, detector, rules, CATEGORIES).eval()
    image = noise(detector, 1, 9).numpy()
    expected = TorchSession(whole).run(image)
    for target in ("onnxruntime", "openvino"):
        engine = target_named(target)
        for width in sorted({8, 16} & set(engine.capabilities.bit_widths)):
            folder = tmp_path / target / str(width)
            written = engine.write(whole, dict.fromkeys(layers, width), ranges, folder)
            if width == 8:
                kinds = [node.op_type for node in onnx.load(written.model).graph.node]
                assert kinds.count("DequantizeLinear") >= len(layers)
            found = engine.prepare(written.model, 1, written.hint).run(image)
            drift = np.abs(found.scores[:10] - expected.scores[:10]).mean()
            assert drift < 0.1
