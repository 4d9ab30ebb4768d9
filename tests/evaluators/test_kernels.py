"""Which kernels run which layer: names in profiles, and what counts as fallen back."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from evaluators.export import export_graph
from evaluators.graph import layer_nodes, tensor_part
from evaluators.integers import quantized
from evaluators.kernels import by_kind, fell_back, kernel_of, unseen
from evaluators.targets.onnx_target import OnnxTarget, by_layer
from evaluators.targets.registry import TARGETS
from evaluators.testing import CATEGORIES, DETECTOR, example_graph, images, layers, network, ranges
from spaces.detectors.base import Postprocess


def test_what_falls_back_is_named_with_both_types() -> None:
    cpu = (32, 16, 8)
    assert [kernel_of(width, cpu) for width in (32, 16, 8, 4)] == ["f32", "bf16", "i8", "i8"]
    assert [kernel_of(width, (32, 8, 4)) for width in (16, 6, 4, 2)] == ["f32", "i8", "i4", "i4"]
    bits = {"a": 8, "b": 16, "c": 32, "d": 4, "gone": 8}
    assert fell_back(bits, {"a": "i8", "b": "bf16", "c": "f32", "d": "i8"}, cpu) == {}
    kernels = {"a": "f32", "b": "f32", "c": "bf16", "d": "i8", "/MatMul": "f32"}
    fallen = {"a": "f32 instead of i8", "b": "f32 instead of bf16", "c": "bf16 instead of f32"}
    assert fell_back(bits, kernels, cpu) == fallen
    assert fell_back(bits, kernels, (32, 8, 4)) == {
        "a": "f32 instead of i8",
        "c": "bf16 instead of f32",
        "d": "i8 instead of i4",
    }
    assert unseen(bits, kernels) == ["gone"]
    nameless = {"/network/a/a.0/Conv": "f32", "/network/b/b.0/Conv": "i8"}
    assert fell_back({"a.0": 8, "b.0": 8, "gone": 8}, nameless, cpu) == {"a.0": "f32 instead of i8"}


def shared_convolution(path: Path) -> Path:
    """One layer that runs twice, and one beside it whose node name begins like the first one's."""
    weight = numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "network.head.weight")
    other = numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "network.tail.weight")
    nodes = [
        helper.make_node("Conv", ["x", "network.head.weight"], ["p"], name="/network/Conv"),
        helper.make_node("Conv", ["p", "network.head.weight"], ["q"], name="/network/Conv_1"),
        helper.make_node("Conv", ["q", "network.tail.weight"], ["y"], name="/network/Conv_10"),
    ]
    shape = [1, 1, 2, 2]
    graph = helper.make_graph(
        nodes,
        "shared",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [weight, other],
    )
    onnx.save(helper.make_model(graph), path)
    return path


def test_kernels_are_found_by_the_longest_name(tmp_path: Path) -> None:
    file = shared_convolution(tmp_path / "model.onnx")
    profile = {"/network/Conv_token_3": "i8", "/network/Conv_1_nchwc": "f32", "/network/Conv_10": "bf16"}
    assert by_layer(file, {**profile, "/MatMul": "f32"}) == {"head": "f32", "tail": "bf16", "/MatMul": "f32"}
    assert by_layer(tmp_path / "model.xml", profile) == profile


def test_a_kernel_may_be_named_after_what_it_produces(tmp_path: Path) -> None:
    """ONNX Runtime does so where it fuses an activation function."""
    graph = onnx.load(shared_convolution(tmp_path / "model.onnx"))
    graph.graph.node[2].output[0] = "r"
    graph.graph.node.append(helper.make_node("Relu", ["r"], ["y"], name="/network/Relu"))
    onnx.save(graph, tmp_path / "model.onnx")
    profile = {"q_nchwc": "i8", "y_nchwc": "f32"}
    assert by_layer(tmp_path / "model.onnx", profile) == {"head": "i8", "tail": "f32"}


def test_nodes_lead_to_their_layers_in_a_quantised_graph() -> None:
    graph = example_graph(Postprocess())
    before = layer_nodes(graph)
    assert sorted(before.values()) == sorted(layers())
    assert layer_nodes(quantized(graph, ranges(), outputs_too=True)) == before


def outputs(graph: onnx.ModelProto, image: np.ndarray) -> Sequence[np.ndarray]:
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": image})


def test_the_tensor_part_ends_with_the_networks_outputs() -> None:
    """Up to the reshaping and activations that belong to decoding: every raw output must be in it."""
    (image,) = images(1)
    with torch.no_grad():
        raw = DETECTOR.simplified(network())(torch.from_numpy(image))
    cut = tensor_part(export_graph(network(), DETECTOR, Postprocess(), CATEGORIES))
    kinds = {node.op_type for node in cut.graph.node}
    assert "NonMaxSuppression" not in kinds
    assert all(node.name.startswith("/network/") for node in cut.graph.node if node.op_type == "Conv")
    values = np.sort(np.concatenate([one.ravel() for one in outputs(cut, image)]))
    expected = np.sort(np.concatenate([one.numpy().ravel() for one in raw]))
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [n for n, t in TARGETS.items() if isinstance(t, OnnxTarget)])
def test_the_tensor_part_of_a_lowered_graph_holds_all_layers(name: str) -> None:
    target = TARGETS[name]
    assert isinstance(target, OnnxTarget)
    lowered = target.lower(example_graph(Postprocess()), dict.fromkeys(layers(), 8), ranges())
    cut = tensor_part(lowered.graph)
    assert sorted(layer_nodes(cut).values()) == sorted(layers())
    assert len(cut.graph.node) < len(lowered.graph.graph.node)


def test_kernels_are_counted_by_type() -> None:
    assert by_kind({"a": "i8", "b": "f32", "c": "i8"}) == {"f32": 1, "i8": 2}
    assert list(by_kind({"a": "i8", "b": "bf16"})) == ["bf16", "i8"]
