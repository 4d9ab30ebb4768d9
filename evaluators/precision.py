"""Bit-widths written into an exported graph: Q/DQ pairs for int8, typed regions for bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from evaluators.graph import layer_of
from evaluators.rewriting import constant, copied, replace_nodes, without_unread

if TYPE_CHECKING:  # torch is behind it
    from evaluators.calibration import LayerRanges, Range

FULL_LEVELS = 127
WEIGHT_CLIPS = np.linspace(1.0, 0.3, 36)
FOLLOWERS = {"Sigmoid", "Mul", "Add", "Relu", "HardSwish", "HardSigmoid", "Clip", "LeakyRelu", "Concat"}
FOLLOWERS |= {"MaxPool", "Resize", "Slice"}
"""Operations that run in bfloat16 between bfloat16 layers. Decoding and suppression stay float32."""


@dataclass(frozen=True)
class Reading:
    """How a tensor is read: its range, or that of each channel, and in how many levels."""

    spans: tuple[Range, ...]
    levels: int = 256

    def alike(self, other: Reading) -> bool:
        """True where both are of the whole tensor, or both of its channels, in as many levels."""
        return self.levels == other.levels and len(self.spans) == len(other.spans)


def quantized(
    graph: onnx.ModelProto,
    layers: Mapping[str, LayerRanges],
    outputs_too: bool,
    weight_levels: int = FULL_LEVELS,
) -> onnx.ModelProto:
    """A copy in which the given layers read integer activations and weights, in bytes whatever their levels.

    Activations are U8 with one scale and zero point, or one a channel where the ranges say so; weights S8
    symmetric with one scale a channel: what the engines' kernels want. Fewer than 256 levels of an activation
    are the lowest ones, what lies above is clipped. Layers that read the same tensor in the same way share
    its Q/DQ pair.

    Args:
        graph: float32.
        layers: ranges of the layers to quantise, by module name.
        outputs_too: quantise what the layers produce as well; ONNX Runtime fuses only such layers, while
            OpenVINO would lose accuracy for nothing.
        weight_levels: of weights to either side of 0, see `evaluators.signature.int8_weight_levels`; a
            layer may ask for fewer.
    """
    graph = copied(graph)
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    pairs: dict[tuple[str, Reading], str] = {}
    produced_pairs: set[str] = set()
    renamed: dict[str, str] = {}
    for node in graph.graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = renamed.get(name, name)
        layer = layer_of(node)
        if layer not in layers or layer is None:
            nodes.append(node)
            continue
        ranges, source = layers[layer], node.input[0]
        reading = Reading(ranges.by_channel or (ranges.read,), ranges.levels)
        # What a layer wrote in 8 bits is not rounded again by whoever reads it in 8.
        if not (source in produced_pairs and reading.levels == 256 and not ranges.by_channel):
            # Layers that read one tensor were calibrated on samples of it: the first one's range serves.
            place = next((p for p in pairs if p[0] == source and p[1].alike(reading)), (source, reading))
            if place not in pairs:
                ending = "" if not any(p[0] == source for p in pairs) else f"_{len(pairs)}"
                pairs[place] = _pair(graph, nodes, source, reading, ending)
            node.input[0] = pairs[place]
        node.input[1] = _weight(graph, nodes, tensors[node.input[1]], min(ranges.largest, weight_levels))
        nodes.append(node)
        if outputs_too:
            produced = node.output[0]
            renamed[produced] = _pair(graph, nodes, produced, Reading((ranges.written,)))
            produced_pairs.add(renamed[produced])
    replace_nodes(graph, nodes)
    return without_unread(graph)


def in_bfloat16(graph: onnx.ModelProto, layers: frozenset[str]) -> onnx.ModelProto:
    """A copy in which the given layers, and what lies between them, compute in bfloat16 whatever the hint.

    Weights are stored in bfloat16, too. An elementwise or copying operation joins where all the layers
    around it are in bfloat16, so that casts stand only at the border of such regions. The first and last
    tensors of the graph stay float32.
    """
    graph = copied(graph)
    chosen = _bfloat16_nodes(graph, layers)
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    half = {name for node in graph.graph.node if _key(node) in chosen for name in node.output}
    nodes: list[onnx.NodeProto] = []
    casts: dict[tuple[str, int], str] = {}

    def cast(name: str, to: int) -> str:
        if (name, to) not in casts:
            casts[name, to] = f"{name}_{'bf16' if to == TensorProto.BFLOAT16 else 'f32'}"
            nodes.append(helper.make_node("Cast", [name], [casts[name, to]], to=to))
        return casts[name, to]

    for node in graph.graph.node:
        inside = _key(node) in chosen
        for position, name in enumerate(node.input):
            if not name or (node.op_type == "Resize" and position > 0):
                continue
            if inside and name in tensors:
                node.input[position] = _stored_half(graph, tensors[name])
            elif inside and name not in half:
                node.input[position] = cast(name, TensorProto.BFLOAT16)
            elif not inside and name in half:
                node.input[position] = cast(name, TensorProto.FLOAT)
        nodes.append(node)
    replace_nodes(graph, nodes)
    return without_unread(graph)


def stored_in_bfloat16(graph: onnx.ModelProto, layers: frozenset[str]) -> onnx.ModelProto:
    """A copy that stores the weights of the given layers in bfloat16 and reads them as float32.

    Half the bytes on disk for layers that the engine computes in bfloat16 anyway.
    """
    graph = copied(graph)
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.graph.node:
        if layer_of(node) in layers:
            stored = _stored_half(graph, tensors[node.input[1]])
            node.input[1] = f"{node.input[1]}_widened"
            nodes.append(helper.make_node("Cast", [stored], [node.input[1]], to=TensorProto.FLOAT))
        nodes.append(node)
    replace_nodes(graph, nodes)
    return without_unread(graph)


def _bfloat16_nodes(graph: onnx.ModelProto, layers: frozenset[str]) -> set[str]:
    """Outputs (as keys) of the nodes that run in bfloat16."""
    producers = {name: node for node in graph.graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    ends = {output.name for output in graph.graph.output}
    inner = [n for n in graph.graph.node if ends.isdisjoint(n.output)]
    chosen = {_key(n) for n in inner if layer_of(n) in layers}
    followers = [n for n in inner if n.op_type in FOLLOWERS]
    # Candidates are dropped until every one left has only bfloat16 sources, and some bfloat16 reader or
    # source: the greatest fixed point, so that whole chains between layers survive together.
    joined = {_key(n) for n in followers}
    changed = True
    while changed:
        changed = False
        for node in followers:
            if _key(node) not in joined:
                continue
            sources = [producers[name] for name in node.input if name in producers]
            tensors = [s for s in sources if s.op_type != "Constant"]
            around = {_key(n) for n in tensors} | {
                _key(n) for name in node.output for n in readers.get(name, [])
            }
            inside = chosen | joined
            if not tensors or not all(_key(s) in inside for s in tensors) or not around & inside:
                joined.discard(_key(node))
                changed = True
    return chosen | joined


def _pair(
    graph: onnx.ModelProto, nodes: list[onnx.NodeProto], tensor: str, reading: Reading, ending: str = ""
) -> str:
    """Add QuantizeLinear and DequantizeLinear behind a tensor; the name of what comes out."""
    grids = [span.grid(reading.levels) for span in reading.spans]
    scales = np.array([scale for scale, _ in grids], np.float32)
    zeros = np.array([zero for _, zero in grids], np.uint8)
    one = len(grids) == 1
    scale_name = constant(graph, f"{tensor}{ending}_scale", scales[0] if one else scales)
    zero_name = constant(graph, f"{tensor}{ending}_zero", zeros[0] if one else zeros)
    quantized_name, result = f"{tensor}{ending}_u8", f"{tensor}{ending}_dequantized"
    source = tensor
    if reading.levels < 256:  # the engines' own clipping is that of a byte
        source = f"{tensor}{ending}_clipped"
        scale, zero = grids[0]
        ends = {"low": -zero * scale, "high": (reading.levels - 1 - zero) * scale}
        bounds = [constant(graph, f"{source}_{end}", np.array(x, np.float32)) for end, x in ends.items()]
        nodes.append(helper.make_node("Clip", [tensor, *bounds], [source]))
    grid, axis = [scale_name, zero_name], {} if one else {"axis": 1}
    nodes.append(helper.make_node("QuantizeLinear", [source, *grid], [quantized_name], **axis))
    nodes.append(helper.make_node("DequantizeLinear", [quantized_name, *grid], [result], **axis))
    return result


def _weight(
    graph: onnx.ModelProto, nodes: list[onnx.NodeProto], tensor: onnx.TensorProto, levels: int
) -> str:
    """Store a weight as S8 with a scale per output channel; the name of its dequantised form."""
    weight = numpy_helper.to_array(tensor)
    scale = weight_scales(weight, levels)
    shape = (-1,) + (1,) * (weight.ndim - 1)
    integers = np.clip(np.round(weight / scale.reshape(shape)), -levels, levels).astype(np.int8)
    names = [
        constant(graph, f"{tensor.name}_s8", integers),
        constant(graph, f"{tensor.name}_scale", scale),
        constant(graph, f"{tensor.name}_zero", np.zeros(scale.shape, np.int8)),
    ]
    result = f"{tensor.name}_dequantized"
    if not any(result in node.output for node in nodes):
        nodes.append(helper.make_node("DequantizeLinear", names, [result], axis=0))
    return result


def weight_scales(weight: NDArray[np.float32], levels: int = FULL_LEVELS) -> NDArray[np.float32]:
    """Scale `(outputs,)` per output channel of symmetric weights in -levels..levels.

    With 127 levels the largest weight is the last one; with fewer, the scale is the one that rounds with the
    least squared error.
    """
    rows = weight.reshape(weight.shape[0], -1).astype(np.float64)
    widest = np.maximum(np.abs(rows).max(axis=1) / levels, 1e-12)
    scales = widest
    if levels < FULL_LEVELS:
        candidates = np.stack([widest * clip for clip in WEIGHT_CLIPS])
        errors = [_weight_errors(rows, scale, levels) for scale in candidates]
        scales = candidates[np.argmin(errors, axis=0), np.arange(len(rows))]
    found: NDArray[np.float32] = np.maximum(scales, 1e-12).astype(np.float32)
    return found


def _weight_errors(rows: NDArray[np.float64], scale: NDArray[np.float64], levels: int) -> NDArray[np.float64]:
    """Mean squared error of every row rounded to multiples of its scale."""
    rounded = np.clip(np.round(rows / scale[:, None]), -levels, levels) * scale[:, None]
    errors: NDArray[np.float64] = ((rounded - rows) ** 2).mean(axis=1)
    return errors


def _stored_half(graph: onnx.ModelProto, tensor: onnx.TensorProto) -> str:
    """A float32 constant as bfloat16; the name to read."""
    if tensor.data_type != TensorProto.FLOAT:
        unchanged: str = tensor.name
        return unchanged
    name = f"{tensor.name}_bf16"
    if not any(t.name == name for t in graph.graph.initializer):
        values = numpy_helper.to_array(tensor)
        graph.graph.initializer.append(numpy_helper.from_array(values.astype(ml_dtypes.bfloat16), name))
    return name


def _key(node: onnx.NodeProto) -> str:
    name: str = node.output[0]
    return name
