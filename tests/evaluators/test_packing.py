"""Packed weights: bytes by hand, engines agree with plain storage in the same kernels, files are smaller."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from evaluators.calibration import LayerRanges, Range, largest_weight
from evaluators.graph import layer_nodes
from evaluators.integers import quantized
from evaluators.packing import PLANES, byte_table, pack, packed

RANDOM = np.random.default_rng(0)
X = RANDOM.uniform(-1, 2, size=(1, 48, 6, 6)).astype(np.float32)
SPAN = LayerRanges(Range(-1.0, 2.0), Range(-12.0, 12.0))


def test_bytes_by_hand() -> None:
    assert pack(np.array([1, 2, 15]), 4).tolist() == [0x21, 0x0F]
    assert pack(np.array([3, 0, 1, 2, 1]), 2).tolist() == [0b10010011, 0b01]
    assert pack(np.array([1, 0, 0, 0, 0, 0, 0, 1, 1]), 1).tolist() == [0b10000001, 1]
    assert byte_table(4)[0x21].tolist() == [1, 2]
    assert byte_table(2)[0b10010011].tolist() == [3, 0, 1, 2]


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_the_table_undoes_packing(width: int) -> None:
    numbers = RANDOM.integers(0, 2**width, 101)
    assert byte_table(width)[pack(numbers, width)].reshape(-1)[:101].tolist() == numbers.tolist()


def test_planes_fill_every_width() -> None:
    assert {bits: sum(widths) for bits, widths in PLANES.items()} == {bits: bits for bits in range(1, 9)}


def chain(weights: list[NDArray[np.float32]]) -> onnx.ModelProto:
    """x -> convolution a -> convolution b -> y."""
    nodes = [
        helper.make_node("Conv", ["x", "network.a.weight"], ["a"], "a", pads=[1] * 4),
        helper.make_node("Conv", ["a", "network.b.weight"], ["y"], "b", pads=[1] * 4),
    ]
    tensors = [numpy_helper.from_array(w, f"network.{n}.weight") for n, w in zip("ab", weights, strict=True)]
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, X.shape) for name in "xy"]
    body = helper.make_graph(nodes, "chain", sides[:1], sides[1:], tensors)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


def random_weights() -> list[NDArray[np.float32]]:
    return [RANDOM.normal(size=(48, 48, 3, 3)).astype(np.float32) * 0.1 for _ in range(2)]


def in_openvino(graph: onnx.ModelProto) -> tuple[NDArray[np.float32], list[str]]:
    """y, and the kernels of the convolutions."""
    core = ov.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "PERF_COUNT": True}
    request = core.compile_model(
        core.read_model(graph.SerializeToString()), "CPU", settings
    ).create_infer_request()
    request.infer([X])
    executed = [i for i in request.get_profiling_info() if i.status.name == "EXECUTED"]
    assert not any(i.node_type in ("Gather", "Split", "Reshape") for i in executed), (
        "folded when it is loaded"
    )
    return request.get_output_tensor(0).data.copy(), [
        i.exec_type for i in executed if i.node_type == "Convolution"
    ]


def in_onnxruntime(graph: onnx.ModelProto, folder: Path) -> tuple[NDArray[np.float32], list[str]]:
    """y, and the operators that ran."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": X})
    events = json.loads(Path(session.end_profiling()).read_text())
    kinds = [e["args"]["op_name"] for e in events if e["name"].endswith("kernel_time")]
    assert not {"Gather", "Split"} & set(kinds), "folded when it is loaded"
    return y, kinds


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_few_levels_run_in_int8_kernels_and_take_their_bits(bits: int, tmp_path: Path) -> None:
    span = LayerRanges(SPAN.read, SPAN.written, largest=largest_weight(bits))
    for outputs_too in (False, True):
        plain = quantized(chain(random_weights()), dict.fromkeys("ab", span), outputs_too)
        small, found = packed(plain)
        onnx.checker.check_model(small, full_check=True)
        assert found == dict.fromkeys("ab", bits)
        saved = len(plain.SerializeToString()) - len(small.SerializeToString())
        assert saved > 0.9 * (1 - bits / 8) * 2 * 48 * 48 * 9 - 6500, "tables and names take some of it"
        if not outputs_too:
            (ours, kernels), (expected, as_plain) = in_openvino(small), in_openvino(plain)
            assert kernels == as_plain
            assert all(kernel.lower().endswith("i8") for kernel in kernels)
        else:
            (ours, kernels), (expected, as_plain) = (in_onnxruntime(g, tmp_path) for g in (small, plain))
            assert kernels == as_plain
            assert kernels.count("QLinearConv") == 1, "what b produces leaves the graph"
        np.testing.assert_array_equal(ours, expected)
        assert layer_nodes(small) == {"a": "a", "b": "b"}, "profiles still find their layers"


@pytest.mark.parametrize("entries", [16, 32, 64, 128, 256])
def test_codebooks_of_floats(entries: int, tmp_path: Path) -> None:
    books = [RANDOM.normal(size=entries).astype(np.float32) * 0.1 for _ in range(2)]
    plain = chain([book[RANDOM.integers(0, entries, (48, 48, 3, 3))] for book in books])
    small, found = packed(plain)
    bits = entries.bit_length() - 1
    assert found == dict.fromkeys("ab", bits)
    size = len(small.SerializeToString())
    assert size < len(plain.SerializeToString()) * bits / 32 + 8 * entries + 6500
    for run in (in_openvino, lambda graph: in_onnxruntime(graph, tmp_path)):
        (ours, kernels), (expected, as_plain) = run(small), run(plain)
        assert kernels == as_plain
        np.testing.assert_array_equal(ours, expected)


def test_codebooks_by_channel(tmp_path: Path) -> None:
    powers = 2.0 ** RANDOM.integers(-6, 4, (48, 1, 1, 1))
    book = np.append(RANDOM.uniform(-1.99, 1.99, size=63), 1.0).astype(np.float32)
    weights = [(book[RANDOM.integers(0, 64, (48, 48, 3, 3))] * powers).astype(np.float32) for _ in range(2)]
    for weight in weights:
        weight[:, 0, 0, 0] = powers.reshape(-1)
    plain = chain(weights)
    small, found = packed(plain)
    assert found == {"a": 6, "b": 6}
    assert len(small.SerializeToString()) < len(plain.SerializeToString()) * 6 / 32 + 8 * 64 + 6500
    for run in (in_openvino, lambda graph: in_onnxruntime(graph, tmp_path)):
        (ours, kernels), (expected, as_plain) = run(small), run(plain)
        assert kernels == as_plain
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("powers", [np.ones((48, 1, 1, 1)), 2.0 ** np.arange(-24, 24).reshape(48, 1, 1, 1)])
def test_bfloat16_values_stay_bfloat16(powers: NDArray[np.float64]) -> None:
    graph = chain(random_weights())
    book = np.append(RANDOM.uniform(-1.9, 1.9, size=15), 1.0).astype(ml_dtypes.bfloat16)
    values = book[RANDOM.integers(0, 16, (48, 48, 3, 3))] * powers.astype(ml_dtypes.bfloat16)
    values[:, 0, 0, 0] = powers.reshape(-1)
    graph.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "network.a.weight_bf16"))
    graph.graph.node[0].input[1] = "widened"
    graph.graph.node.insert(
        0, helper.make_node("Cast", ["network.a.weight_bf16"], ["widened"], to=TensorProto.FLOAT)
    )
    small, found = packed(graph)
    assert found == {"a": 4}
    table = next(t for t in small.graph.initializer if t.name.endswith("_values"))
    assert table.data_type == TensorProto.BFLOAT16
    np.testing.assert_array_equal(in_openvino(small)[0], in_openvino(graph)[0])


def test_what_would_not_become_smaller_stays() -> None:
    graph = chain(random_weights())
    assert packed(graph) == (graph, {})
    tiny = chain([np.zeros((48, 48, 3, 3), np.float32) + k for k in (1, 2)])
    tiny.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.ones((4, 4), np.float32), "network.a.weight")
    )
    assert packed(tiny)[1] == {"b": 1}
