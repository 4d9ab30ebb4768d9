"""RetinaNet and FCOS as files: whole detectors in both engines against torch, pruned ones too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from evaluators.export import export_graph
from evaluators.exported import write_graph
from evaluators.postprocess import WholeDetector
from evaluators.targets.onnx_target import OnnxTarget
from evaluators.targets.registry import target_named
from evaluators.torch_session import TorchSession
from spaces.apply import apply
from spaces.detectors.base import Category, postprocess_of
from spaces.detectors.registry import make_detector
from spaces.recipe import Prune, Recipe
from spaces.sites import find_sites
from spaces.testing import lively_network, noise

CATEGORIES = [Category(7, "a"), Category(3, "b"), Category(90, "c")]


@pytest.mark.parametrize("name", ["retinanet_resnet18_fpn", "fcos_resnet18_fpn"])
def test_pruned_files_find_what_torch_finds(name: str, tmp_path: Path) -> None:
    detector = make_detector(name, 3, (96, 96))
    network = lively_network(detector)
    sites = find_sites(detector, network)
    choices = tuple(Prune(site=site, sparsity=0.5) for site in sites.channel)
    pruned = apply(network, Recipe(detector=name, choices=choices), sites).network
    rules = postprocess_of(detector)
    graph = export_graph(pruned, detector, rules, CATEGORIES)
    whole = TorchSession(WholeDetector(detector.simplified(pruned), detector, rules, CATEGORIES))
    for target in ("onnxruntime", "openvino"):
        engine = target_named(target)
        assert isinstance(engine, OnnxTarget)
        file = write_graph(engine.lower(graph, {}, {}).graph, tmp_path / target)
        session = engine.prepare(file, 1, "f32")
        for images in (noise(detector, 1), torch.zeros(1, 3, 96, 96)):
            found, expected = session.run(images.numpy()), whole.run(images.numpy())
            assert len(expected.scores) > 0
            np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)
            for box, label in zip(expected.boxes[:10], expected.labels[:10], strict=True):
                same = found.boxes[found.labels == label]
                assert np.abs(same - box).max(axis=1).min() < 0.05  # pixels
