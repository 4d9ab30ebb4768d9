"""Kernels with one scale a tensor: scales of channels folded around them, against integers in NumPy."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from evaluators.calibration import LayerRanges, Range, with_one_zero_point
from evaluators.integers import quantized, weight_scales

RANDOM = np.random.default_rng(0)
CHANNELS, SIDE = 4, 6
SIZES = np.array([0.02, 0.3, 2.0, 40.0], np.float32)
"""Channels whose values differ by orders of magnitude, as those of a network with BatchNorm folded do."""
WEIGHTS = {
    "a": (RANDOM.normal(size=(CHANNELS, CHANNELS, 1, 1)) * SIZES.reshape(-1, 1, 1, 1)).astype(np.float32),
    "thin": RANDOM.normal(size=(CHANNELS, 1, 3, 3)).astype(np.float32),
    "b": RANDOM.normal(size=(CHANNELS, CHANNELS, 1, 1)).astype(np.float32),
}
BIAS = RANDOM.normal(size=CHANNELS).astype(np.float32)
X = RANDOM.uniform(-1, 2, size=(1, CHANNELS, SIDE, SIDE)).astype(np.float32)
READ = Range(-1.0, 2.0)
Array = NDArray[np.float32]


def model(
    nodes: list[onnx.NodeProto], end: str, constants: dict[str, NDArray[np.generic]]
) -> onnx.ModelProto:
    """x -> ... -> `end`, which is multiplied by 1, for engines fuse no layer at the very end."""
    last = helper.make_node("Mul", [end, "one"], ["y"])
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    tensors.append(numpy_helper.from_array(np.array(1.0, np.float32), "one"))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)
    body = helper.make_graph([*nodes, last], "model", [x], [y], tensors)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def layer(name: str, source: str, biased: bool = False) -> onnx.NodeProto:
    """A convolution."""
    inputs = [source, f"network.{name}.weight", *([f"network.{name}.bias"] if biased else [])]
    thin = {"group": CHANNELS, "pads": [1, 1, 1, 1]} if name == "thin" else {}
    return helper.make_node("Conv", inputs, [name], f"/network/{name}/Conv", **thin)


def constants(*names: str) -> dict[str, NDArray[np.generic]]:
    """Weights of these layers, and the bias of the first."""
    return {f"network.{name}.weight": WEIGHTS[name] for name in names} | {f"network.{names[0]}.bias": BIAS}


def run(graph: onnx.ModelProto, rewritten: bool = False) -> tuple[Array, list[str]]:
    """What the graph says, or what the engine makes of it; and the operations that it runs."""
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if rewritten else level.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": X})
    return y, [node.op_type for node in graph.graph.node]


def silu(x: Array) -> Array:
    return (x / (1 + np.exp(np.minimum(-x, 80)))).astype(np.float32)


def pointwise(x: Array, weight: Array) -> Array:
    return np.einsum("oi,nihw->nohw", weight[:, :, 0, 0], x)


def depthwise(x: Array, weight: Array) -> Array:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.einsum("nchwij,cij->nchw", windows, weight[:, 0])


def rounded_weight(weight: Array) -> Array:
    scale = weight_scales(weight).reshape(-1, 1, 1, 1)
    return np.round(weight / scale) * scale


def rounded(x: Array, spans: tuple[Range, ...]) -> Array:
    """To bytes and back, every channel on its own grid."""
    scale, zero = (np.array([span.grid()[k] for span in spans]).reshape(1, -1, 1, 1) for k in (0, 1))
    return ((np.clip(np.round(x / scale) + zero, 0, 255) - zero) * scale).astype(np.float32)


def spans_of(x: Array) -> tuple[Range, ...]:
    rows = x.transpose(1, 0, 2, 3).reshape(x.shape[1], -1)
    return tuple(Range(min(float(row.min()), 0.0), max(float(row.max()), 0.0)) for row in rows)


def whole(spans: tuple[Range, ...]) -> Range:
    return Range(min(span.low for span in spans), max(span.high for span in spans))


# x -> a -> SiLU -> thin, depthwise
A = pointwise(X, WEIGHTS["a"]) + BIAS.reshape(1, -1, 1, 1)
THIN = depthwise(silu(A), WEIGHTS["thin"])
NODES = [
    layer("a", "x", biased=True),
    helper.make_node("Sigmoid", ["a"], ["s"]),
    helper.make_node("Mul", ["a", "s"], ["silu"]),
    layer("thin", "silu"),
]
CHAIN = model(NODES, "thin", constants("a", "thin"))
RANGES = {
    "a": LayerRanges(READ, whole(spans_of(A)), written_by_channel=spans_of(A)),
    "thin": LayerRanges(
        whole(spans_of(silu(A))),
        whole(spans_of(THIN)),
        with_one_zero_point(spans_of(silu(A))),
        spans_of(THIN),
    ),
}


def expected() -> Array:
    """The chain with every tensor rounded, channel by channel."""
    a = pointwise(rounded(X, (READ,)), rounded_weight(WEIGHTS["a"])) + BIAS.reshape(1, -1, 1, 1)
    read = rounded(silu(rounded(a, RANGES["a"].written_by_channel)), RANGES["thin"].by_channel)
    return rounded(depthwise(read, rounded_weight(WEIGHTS["thin"])), RANGES["thin"].written_by_channel)


def relative_errors(y: Array, reference: Array) -> NDArray[np.float64]:
    """Of every channel: largest error over largest value."""
    errors: NDArray[np.float64] = np.abs(y - reference).max(axis=(0, 2, 3)) / np.abs(THIN).max(axis=(0, 2, 3))
    return errors


def test_one_zero_point_by_hand() -> None:
    alike = (Range(-1.0, 3.0), Range(-10.0, 30.0))
    for span, before in zip(with_one_zero_point(alike, 5), alike, strict=True):
        assert (span.low, span.high) == pytest.approx((before.low, before.high))
    # Four steps. Zero point 1 makes (-2, 2) twice as wide: squared, 1 for each of the others and 4. Zero
    # point 2 leaves it and makes the others 1.5 times as wide: 2.25 each and 1.
    one, other = Range(-1.0, 3.0), Range(-2.0, 2.0)
    for count, wanted in ((2, [(-3.0, 3.0), (-2.0, 2.0)]), (3, [(-1.0, 3.0), (-2.0, 6.0)])):
        found = with_one_zero_point((*[one] * count, other), 5)
        assert [(span.low, span.high) for span in found[-2:]] == [pytest.approx(span) for span in wanted]


def test_ranges_are_never_cut_for_their_zero_point() -> None:
    random = np.random.default_rng(1)
    spans = tuple(Range(-float(low), float(high)) for low, high in random.exponential(size=(50, 2)))
    spans += (Range(0.0, 1e-6), Range(0.0, 5.0), Range(-3.0, 0.0))
    found = with_one_zero_point(spans)
    assert len({span.grid()[1] for span in found}) == 1
    assert all(f.low <= s.low + 1e-9 and f.high >= s.high - 1e-9 for f, s in zip(found, spans, strict=True))


@pytest.mark.parametrize("plain_pairs", [False, True])
def test_scales_of_channels_around_kernels_with_one(plain_pairs: bool) -> None:
    graph = quantized(CHAIN, RANGES, outputs_too=True, plain_pairs=plain_pairs)
    onnx.checker.check_model(graph, full_check=True)
    y, kinds = run(graph)
    steps = np.array([span.grid()[0] for span in RANGES["thin"].written_by_channel]).reshape(1, -1, 1, 1)
    wrong = np.abs(y - expected()) / steps
    assert (wrong > 0.5).mean() < 0.02, "a value on the border between two steps may fall to either side"
    assert wrong.max() < 1.5
    assert kinds.count("QuantizeLinear") == kinds.count("DequantizeLinear") - 2 == 4
    by_axis = [n for n in graph.graph.node if n.op_type.endswith("izeLinear") and n.attribute]
    assert len(by_axis) == (2 if plain_pairs else 5), "weights, and channels where there are no plain pairs"
    one_scale = {n: replace(r, by_channel=(), written_by_channel=()) for n, r in RANGES.items()}
    plain, _ = run(quantized(CHAIN, one_scale, outputs_too=True))
    assert relative_errors(y, THIN).max() < 0.03
    assert relative_errors(plain, THIN).max() > 0.3, "one scale for all channels must lose the small ones"


@pytest.mark.parametrize("plain_pairs", [False, True])
def test_the_engine_runs_integer_kernels_and_agrees(plain_pairs: bool) -> None:
    graph = quantized(CHAIN, RANGES, outputs_too=True, plain_pairs=plain_pairs)
    y, _ = run(graph)
    steps = np.array([span.grid()[0] for span in RANGES["thin"].written_by_channel]).reshape(1, -1, 1, 1)
    assert (np.abs(run(graph, rewritten=True)[0] - y) / steps).max() < 1.5


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("plain_pairs", [False, True])
@pytest.mark.parametrize("gain", [0.0, 1e-7])
def test_a_channel_without_weights_keeps_its_bias(plain_pairs: bool, learned: bool, gain: float) -> None:
    """A BatchNorm's gain of 0, folded in: the engine adds the bias in steps of the weights' scale."""
    dead = CHANNELS - 1
    values = constants("a", "thin")
    values["network.a.weight"] = WEIGHTS["a"] * np.where(np.arange(CHANNELS) == dead, gain, 1).reshape(
        -1, 1, 1, 1
    ).astype(np.float32)
    before = weight_scales(values["network.a.weight"])
    ranges = dict(RANGES)
    if learned:
        ranges["a"] = replace(ranges["a"], weight_scales=tuple(before.tolist()))
    graph = quantized(model(NODES, "thin", values), ranges, outputs_too=True, plain_pairs=plain_pairs)
    y, _ = run(graph)
    steps = np.array([span.grid()[0] for span in RANGES["thin"].written_by_channel]).reshape(1, -1, 1, 1)
    assert (np.abs(run(graph, rewritten=True)[0] - y) / steps).max() < 1.5
    found = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    written = RANGES["a"].written_by_channel
    factors = np.array([span.grid()[0] for span in written])
    scales = found["network.a.weight_scale"] * factors / factors.max()
    np.testing.assert_allclose(scales[:dead], before[:dead], rtol=1e-6)
    assert scales[dead] > before[dead]


def test_without_rounding_the_folds_leave_the_outputs() -> None:
    """The folded kernels on numbers instead of bytes: Q and DQ replaced by what they multiply and add."""
    graph = quantized(CHAIN, RANGES, outputs_too=True)
    found = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in graph.graph.initializer}
    original = {f"{name}_s8": WEIGHTS[name] for name in WEIGHTS}
    values: dict[str, NDArray[np.float64]] = {"x": X.astype(np.float64)}
    for node in graph.graph.node:
        first, *others = node.input
        if first.endswith("_s8"):
            layer_name = first.split(".")[1]
            plain = weight_scales(WEIGHTS[layer_name]).astype(np.float64)
            factor = (found[others[0]] / plain).reshape(-1, 1, 1, 1)
            values[node.output[0]] = original[f"{layer_name}_s8"] * factor
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = (found[name].reshape(1, -1, 1, 1) for name in others)
            x = values[first]
            down = node.op_type == "QuantizeLinear"
            values[node.output[0]] = x / scale + zero if down else (x - zero) * scale
        elif node.op_type == "Conv":
            kernel = depthwise if "thin" in node.name else pointwise
            bias = found[node.input[2]].reshape(1, -1, 1, 1)
            values[node.output[0]] = kernel(values[first], values[others[0]]) + bias  # type: ignore[arg-type]
        elif node.op_type == "Sigmoid":
            values[node.output[0]] = 1 / (1 + np.exp(-values[first]))
        else:
            values[node.output[0]] = values[first] * values.get(others[0], 1.0)
    np.testing.assert_allclose(values["y"], THIN, rtol=0, atol=1e-4)


# -- what ONNX Runtime makes of operations between layers

BETWEEN = {
    "Sigmoid": ([helper.make_node("Sigmoid", ["a"], ["m"])], {}),
    "SiLU": ([*NODES[1:2], helper.make_node("Mul", ["a", "s"], ["m"])], {}),
    "ReLU": ([helper.make_node("Relu", ["a"], ["m"])], {}),
    "Clip": ([helper.make_node("Clip", ["a", "low", "high"], ["m"])], {"low": 0.0, "high": 6.0}),
    "HardSwish": ([helper.make_node("HardSwish", ["a"], ["m"])], {}),
    "LeakyReLU": ([helper.make_node("LeakyRelu", ["a"], ["m"], alpha=0.1)], {}),
    "Add": ([helper.make_node("Add", ["a", "a"], ["m"])], {}),
    "Concat": ([helper.make_node("Concat", ["a", "a"], ["m"], axis=2)], {}),
    "MaxPool": ([helper.make_node("MaxPool", ["a"], ["m"], kernel_shape=[3, 3])], {}),
    "mean": ([helper.make_node("GlobalAveragePool", ["a"], ["m"])], {}),
    "Softmax": ([helper.make_node("Softmax", ["a"], ["m"], axis=1)], {}),
    "Transpose": (
        [
            helper.make_node("Transpose", ["a"], ["t"], perm=[0, 2, 3, 1]),
            helper.make_node("Transpose", ["t"], ["m"], perm=[0, 3, 1, 2]),
        ],
        {},
    ),
    "layer": ([layer("thin", "a"), helper.make_node("Relu", ["thin"], ["m"])], {}),
}


@pytest.mark.parametrize("plain_pairs", [False, True])
@pytest.mark.parametrize("between", BETWEEN)
def test_whatever_reads_a_layer_the_engine_agrees(between: str, plain_pairs: bool) -> None:
    nodes, extra = BETWEEN[between]
    weights = constants("a", "thin", "b") if between == "layer" else constants("a", "b")
    values = weights | {name: np.array(value, np.float32) for name, value in extra.items()}
    graph = model([layer("a", "x", biased=True), *nodes, layer("b", "m")], "b", values)
    wide = Range(-50.0, 50.0)
    ranges = {"a": RANGES["a"], "b": LayerRanges(wide, Range(-200.0, 200.0))}
    ranges["thin"] = replace(RANGES["thin"], read=wide, by_channel=())
    made = quantized(graph, ranges, outputs_too=True, plain_pairs=plain_pairs)
    apart = any(
        n.output[0] == "a_dequantized_scaled"
        if plain_pairs
        else n.output[0] == "a_dequantized" and n.attribute
        for n in made.graph.node
    )
    assert apart == (between not in {"Sigmoid", "LeakyReLU", "mean", "Softmax", "layer"})
    step = 400 / 255
    assert np.abs(run(made)[0] - run(made, rewritten=True)[0]).max() < 1.5 * step
