"""Bit-widths in graphs: one convolution against integers in NumPy, regions and borders, whole detectors."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from evaluators.calibration import LayerRanges, Range
from evaluators.integers import quantized, weight_scales
from evaluators.precision import in_bfloat16, stored_in_bfloat16
from evaluators.signature import int8_weight_levels
from evaluators.targets.openvino_cpu import OpenVino
from evaluators.testing import can_run, check_detections, example_graph, images, layers, ranges
from spaces.detectors.base import Postprocess

RANDOM = np.random.default_rng(0)
WEIGHTS = {name: RANDOM.normal(size=(4, 4, 1, 1)).astype(np.float32) for name in "abc"}
X = RANDOM.uniform(-1, 2, size=(1, 4, 5, 5)).astype(np.float32)
SPAN = LayerRanges(read=Range(-1.0, 2.0), written=Range(-6.0, 6.0))
needs_bfloat16 = pytest.mark.skipif(not can_run(16), reason="this CPU has no bfloat16 instructions")


def chain() -> onnx.ModelProto:
    """x -> convolution a -> SiLU -> convolutions b and c, which both read it -> y = b + c."""
    nodes = [
        helper.make_node("Conv", ["x", "network.a.weight"], ["a"], "a"),
        helper.make_node("Sigmoid", ["a"], ["s"]),
        helper.make_node("Mul", ["a", "s"], ["silu"]),
        helper.make_node("Conv", ["silu", "network.b.weight"], ["b"], "b"),
        helper.make_node("Conv", ["silu", "network.c.weight"], ["c"], "c"),
        helper.make_node("Add", ["b", "c"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(w, f"network.{name}.weight") for name, w in WEIGHTS.items()]
    shape = [1, 4, 5, 5]
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    body = helper.make_graph(nodes, "chain", sides[:1], sides[1:], tensors)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


def conv(x: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """A 1x1 convolution."""
    return np.einsum("oi,nihw->nohw", weight[:, :, 0, 0], x).astype(np.float32)


def silu(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return x / (1 + np.exp(-x))


def plain(x: NDArray[np.float32]) -> NDArray[np.float32]:
    middle = silu(conv(x, WEIGHTS["a"]))
    return conv(middle, WEIGHTS["b"]) + conv(middle, WEIGHTS["c"])


def as_typed(graph: onnx.ModelProto) -> NDArray[np.float32]:
    """What the graph says, without an engine's rewrites."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": X})
    return y


def in_openvino(graph: onnx.ModelProto, hint: str = "f32") -> NDArray[np.float32]:
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": 1}
    core = ov.Core()
    compiled = core.compile_model(core.read_model(graph.SerializeToString()), "CPU", settings)
    return next(iter(compiled([X]).values()))


def kinds(graph: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in graph.graph.node]


def rounded(x: NDArray[np.float32], span: Range) -> NDArray[np.float32]:
    """8-bit unsigned with a zero point."""
    scale = (span.high - span.low) / 255
    zero = round(-span.low / scale)
    return ((np.clip(np.round(x / scale) + zero, 0, 255) - zero) * scale).astype(np.float32)


def rounded_weight(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """8-bit signed, symmetric, a scale an output channel."""
    scale = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / 127
    return (np.round(weight / scale) * scale).astype(np.float32)


def half(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """To bfloat16 and back."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


# -- int8


def test_weight_scales_by_hand() -> None:
    weight = np.array([[1.0, -2.54], [0.127, 0.0], [0.0, 0.0]], np.float32)
    np.testing.assert_allclose(weight_scales(weight), [0.02, 0.001, 1e-12], rtol=1e-6)
    np.testing.assert_allclose(weight_scales(weight, 63)[:2], [2.54 / 63, 0.127 / 63], rtol=1e-6)


@pytest.mark.parametrize("levels", [127, 63])
def test_weights_keep_to_their_levels(levels: int) -> None:
    graph = quantized(chain(), {"a": SPAN}, outputs_too=False, weight_levels=levels)
    (integers,) = [numpy_helper.to_array(t) for t in graph.graph.initializer if t.name.endswith("_s8")]
    assert np.abs(integers.reshape(len(integers), -1)).max(axis=1).tolist() == [levels] * len(integers)


@pytest.mark.parametrize("outputs_too", [False, True])
def test_one_int8_convolution_against_integers(outputs_too: bool) -> None:
    graph = quantized(chain(), {"a": SPAN}, outputs_too)
    a = conv(rounded(X, SPAN.read), rounded_weight(WEIGHTS["a"]))
    a = rounded(a, SPAN.written) if outputs_too else a
    expected = conv(silu(a), WEIGHTS["b"]) + conv(silu(a), WEIGHTS["c"])
    np.testing.assert_allclose(as_typed(graph), expected, rtol=0, atol=1e-4)
    assert np.abs(expected - plain(X)).max() > 1e-2, "rounding must be felt, or this shows nothing"
    assert as_typed(chain()) == pytest.approx(plain(X), abs=1e-5)


def test_engines_agree_with_int8_as_typed() -> None:
    graph = quantized(chain(), dict.fromkeys("abc", SPAN), False, int8_weight_levels())
    # What is read may fall on the other side of a step: 1/85 wide, times weights that sum up to some 5.
    np.testing.assert_allclose(in_openvino(graph), as_typed(graph), rtol=0, atol=0.06)
    stored = {t.name: t.data_type for t in graph.graph.initializer}
    for name in "abc":
        assert stored[f"network.{name}.weight_s8"] == TensorProto.INT8
        assert f"network.{name}.weight" not in stored, "the float32 weight would count as size"


def test_readers_of_one_tensor_share_a_pair() -> None:
    graph = quantized(chain(), {"b": SPAN, "c": SPAN}, outputs_too=False)
    assert kinds(graph).count("QuantizeLinear") == 1
    assert kinds(graph).count("DequantizeLinear") == 1 + 2  # and one a weight
    both = quantized(chain(), dict.fromkeys("abc", SPAN), outputs_too=True)
    assert kinds(both).count("QuantizeLinear") == 2 + 3  # x and silu; a, b and c
    onnx.checker.check_model(both, full_check=True)


def test_what_a_layer_produces_is_not_rounded_again_by_its_reader() -> None:
    graph = chain()
    for node in graph.graph.node[3:5]:
        node.input[0] = "a"  # b and c read what a produces
    both = quantized(graph, dict.fromkeys("abc", SPAN), outputs_too=True)
    assert kinds(both).count("QuantizeLinear") == 1 + 3  # x; a, b and c


def test_a_saturated_range_clips() -> None:
    narrow = LayerRanges(read=Range(0.0, 1.0), written=SPAN.written)
    a = conv(np.clip(np.round(X * 255), 0, 255) / 255, rounded_weight(WEIGHTS["a"]))
    expected = conv(silu(a), WEIGHTS["b"]) + conv(silu(a), WEIGHTS["c"])
    np.testing.assert_allclose(as_typed(quantized(chain(), {"a": narrow}, False)), expected, atol=1e-4)


# -- bfloat16


def test_casts_stand_at_the_borders_of_a_region_alone() -> None:
    everything = in_bfloat16(chain(), frozenset("abc"))
    assert kinds(everything) == ["Cast", "Conv", "Sigmoid", "Mul", "Conv", "Conv", "Cast", "Cast", "Add"]
    onnx.checker.check_model(everything, full_check=True)  # y is float32, as the graph says
    first = in_bfloat16(chain(), frozenset("a"))  # what follows joins: it reads bfloat16 alone
    assert kinds(first) == ["Cast", "Conv", "Sigmoid", "Mul", "Cast", "Conv", "Conv", "Add"]
    last = in_bfloat16(chain(), frozenset("b"))
    assert kinds(last) == ["Conv", "Sigmoid", "Mul", "Cast", "Conv", "Conv", "Cast", "Add"]
    assert kinds(in_bfloat16(chain(), frozenset())) == kinds(chain())


def test_what_decodes_follows_no_layer() -> None:
    """It reads bfloat16 alone, as an operation of the network does that joins."""
    graph = chain()
    for node, name in zip(graph.graph.node[1:3], ("/network/Sigmoid", "/Mul"), strict=True):
        node.name = name
    assert kinds(in_bfloat16(graph, frozenset("a"))) == [
        *("Cast", "Conv", "Sigmoid", "Cast", "Cast", "Mul", "Conv", "Conv", "Add")
    ]


def test_bfloat16_computes_on_rounded_numbers_whatever_the_hint() -> None:
    graph = in_bfloat16(chain(), frozenset("b"))
    middle = silu(conv(X, WEIGHTS["a"]))
    b = half(conv(half(middle), half(WEIGHTS["b"])))
    expected = b + conv(middle, WEIGHTS["c"])
    off = np.abs(in_openvino(graph) - expected).max()
    # A last place of bfloat16: sums are ordered differently, and CPUs without its instructions round later.
    assert off < 2**-7 * np.abs(b).max()
    assert np.abs(expected - plain(X)).max() > 2**-10


def test_weights_stored_in_bfloat16_are_the_rounded_ones() -> None:
    graph = stored_in_bfloat16(chain(), frozenset("ab"))
    middle = silu(conv(X, half(WEIGHTS["a"])))
    expected = conv(middle, half(WEIGHTS["b"])) + conv(middle, WEIGHTS["c"])
    np.testing.assert_allclose(in_openvino(graph), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(as_typed(graph), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("twice", [False, True])
def test_weights_that_are_alike_or_read_twice_are_stored_once(twice: bool) -> None:
    """As the exporter writes equal weights, and a layer that is called again."""
    graph = chain()
    del graph.graph.initializer[2]
    if twice:
        graph.graph.node[4].input[1] = "network.b.weight"
    else:
        graph.graph.node.insert(0, helper.make_node("Identity", ["network.b.weight"], ["network.c.weight"]))
    small = stored_in_bfloat16(graph, frozenset("abc"))
    onnx.checker.check_model(small, full_check=True)
    assert [t.name for t in small.graph.initializer] == ["network.a.weight_bf16", "network.b.weight_bf16"]
    expected = 2 * conv(silu(conv(X, half(WEIGHTS["a"]))), half(WEIGHTS["b"]))
    np.testing.assert_allclose(as_typed(small), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(in_openvino(small), expected, rtol=0, atol=1e-4)


# -- the whole detector


def weight_bytes(graph: onnx.ModelProto) -> int:
    return sum(numpy_helper.to_array(t).nbytes for t in graph.graph.initializer)


@pytest.mark.parametrize("rewrite", [in_bfloat16, stored_in_bfloat16])
def test_bfloat16_halves_the_file(rewrite) -> None:  # type: ignore[no-untyped-def]
    graph = example_graph(Postprocess())
    smaller = rewrite(graph, frozenset(layers()))
    assert weight_bytes(smaller) < 0.52 * weight_bytes(graph)
    assert len(smaller.SerializeToString()) < 0.6 * len(graph.SerializeToString())


def test_decoding_stays_float32() -> None:
    graph = onnx.shape_inference.infer_shapes(in_bfloat16(example_graph(Postprocess()), frozenset(layers())))
    known = [*graph.graph.value_info, *graph.graph.input, *graph.graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in known}
    half = [n for n in graph.graph.node if types.get(n.output[0]) == TensorProto.BFLOAT16]
    assert {"Conv", "Sigmoid", "Mul", "Concat", "Cast"} <= {n.op_type for n in half}
    assert all(n.name.startswith("/network/") for n in half if n.op_type != "Cast")
    assert any(n.op_type == "Exp" for n in graph.graph.node), "decoding is there"
    assert [types[o.name] for o in graph.graph.output] == [TensorProto.FLOAT] * 2 + [TensorProto.INT64]


@needs_bfloat16
def test_each_layer_runs_at_its_own_width(tmp_path: Path) -> None:
    bits = dict(zip(layers(), [32] * 20 + [16] * 20 + [8] * len(layers()), strict=False))
    product = OpenVino().lower(example_graph(Postprocess()), bits, ranges())
    assert product.hint == "f32"
    file = tmp_path / "model.onnx"
    file.write_bytes(product.graph.SerializeToString())
    session = OpenVino().prepare(file, 1, product.hint)
    check_detections(session.run(images(1)[0]))
    executed = list(session.kernels().values())
    wanted = list(bits.values())
    assert {k: executed.count(k) for k in set(executed)} == {
        "f32": wanted.count(32),
        "bf16": wanted.count(16),
        "i8": wanted.count(8),
    }


def test_the_hint_is_used_where_no_layer_is_wide() -> None:
    bits = {layer: (16, 8)[k % 2] for k, layer in enumerate(layers())}
    graph = example_graph(Postprocess())
    assert OpenVino().lower(graph, bits, ranges()).hint == "bf16"
    assert OpenVino().lower(graph, dict.fromkeys(layers(), 16), ranges()).hint == "bf16"
    mixed = {layer: (16, 32)[k % 2] for k, layer in enumerate(layers())}
    assert OpenVino().lower(graph, mixed, ranges()).hint == "f32"
