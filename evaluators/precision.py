"""Bit-widths written into an exported graph: Q/DQ pairs for int8, typed regions for bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from evaluators.graph import layer_of

if TYPE_CHECKING:  # torch is behind it
    from evaluators.calibration import LayerRanges, Range

FULL_LEVELS = 127
FOLLOWERS = {"Sigmoid", "Mul", "Add", "Relu", "HardSwish", "HardSigmoid", "Clip", "LeakyRelu", "Concat"}
FOLLOWERS |= {"MaxPool", "Resize", "Slice"}
"""Operations that run in bfloat16 between bfloat16 layers. Decoding and suppression stay float32."""


def quantized(
    graph: onnx.ModelProto,
    layers: Mapping[str, LayerRanges],
    outputs_too: bool,
    weight_levels: int = FULL_LEVELS,
) -> onnx.ModelProto:
    """A copy in which the given layers read 8-bit activations and weights.

    Activations are U8 with one scale and zero point, weights S8 symmetric with one scale a channel: what
    both engines' kernels want. Layers that read the same tensor share its Q/DQ pair.

    Args:
        graph: float32.
        layers: ranges of the layers to quantise, by module name.
        outputs_too: quantise what the layers produce as well; ONNX Runtime fuses only such layers, while
            OpenVINO would lose accuracy for nothing.
        weight_levels: of weights to either side of 0, see `evaluators.signature.int8_weight_levels`.
    """
    graph = _copy(graph)
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    pairs: dict[str, str] = {}
    renamed: dict[str, str] = {}
    for node in graph.graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = renamed.get(name, name)
        layer = layer_of(node)
        if layer not in layers or layer is None:
            nodes.append(node)
            continue
        source = node.input[0]
        if source not in pairs:
            pairs[source] = _pair(graph, nodes, source, layers[layer].read)
        node.input[0] = pairs[source]
        node.input[1] = _weight(graph, nodes, tensors[node.input[1]], weight_levels)
        nodes.append(node)
        if outputs_too:
            produced = node.output[0]
            renamed[produced] = _pair(graph, nodes, produced, layers[layer].written)
            pairs[renamed[produced]] = renamed[produced]
    _replace_nodes(graph, nodes)
    return _pruned(graph)


def in_bfloat16(graph: onnx.ModelProto, layers: frozenset[str]) -> onnx.ModelProto:
    """A copy in which the given layers, and what lies between them, compute in bfloat16 whatever the hint.

    Weights are stored in bfloat16, too. An elementwise or copying operation joins where all the layers
    around it are in bfloat16, so that casts stand only at the border of such regions. The first and last
    tensors of the graph stay float32.
    """
    graph = _copy(graph)
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
    _replace_nodes(graph, nodes)
    return _pruned(graph)


def stored_in_bfloat16(graph: onnx.ModelProto, layers: frozenset[str]) -> onnx.ModelProto:
    """A copy that stores the weights of the given layers in bfloat16 and reads them as float32.

    Half the bytes on disk for layers that the engine computes in bfloat16 anyway.
    """
    graph = _copy(graph)
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.graph.node:
        if layer_of(node) in layers:
            stored = _stored_half(graph, tensors[node.input[1]])
            node.input[1] = f"{node.input[1]}_widened"
            nodes.append(helper.make_node("Cast", [stored], [node.input[1]], to=TensorProto.FLOAT))
        nodes.append(node)
    _replace_nodes(graph, nodes)
    return _pruned(graph)


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


def _pair(graph: onnx.ModelProto, nodes: list[onnx.NodeProto], tensor: str, span: Range) -> str:
    """Add QuantizeLinear and DequantizeLinear behind a tensor; the name of what comes out."""
    scale = (span.high - span.low) / 255
    zero = round(-span.low / scale)
    scale_name = _constant(graph, f"{tensor}_scale", np.array(scale, np.float32))
    zero_name = _constant(graph, f"{tensor}_zero", np.array(np.clip(zero, 0, 255), np.uint8))
    quantized_name, result = f"{tensor}_u8", f"{tensor}_dequantized"
    nodes.append(helper.make_node("QuantizeLinear", [tensor, scale_name, zero_name], [quantized_name]))
    nodes.append(helper.make_node("DequantizeLinear", [quantized_name, scale_name, zero_name], [result]))
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
        _constant(graph, f"{tensor.name}_s8", integers),
        _constant(graph, f"{tensor.name}_scale", scale),
        _constant(graph, f"{tensor.name}_zero", np.zeros(scale.shape, np.int8)),
    ]
    result = f"{tensor.name}_dequantized"
    if not any(result in node.output for node in nodes):
        nodes.append(helper.make_node("DequantizeLinear", names, [result], axis=0))
    return result


def weight_scales(weight: NDArray[np.float32], levels: int = FULL_LEVELS) -> NDArray[np.float32]:
    """Scale `(outputs,)` per output channel of symmetric weights in -levels..levels."""
    largest = np.abs(weight).reshape(weight.shape[0], -1).max(axis=1)
    scales: NDArray[np.float32] = np.maximum(largest / levels, 1e-12).astype(np.float32)
    return scales


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


def _constant(graph: onnx.ModelProto, name: str, value: NDArray[np.generic]) -> str:
    if not any(tensor.name == name for tensor in graph.graph.initializer):
        graph.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def _key(node: onnx.NodeProto) -> str:
    name: str = node.output[0]
    return name


def _copy(graph: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(graph)
    return copied


def _replace_nodes(graph: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    fresh = [_duplicate(node) for node in nodes]
    del graph.graph.node[:]
    graph.graph.node.extend(fresh)
    del graph.graph.value_info[:]


def _duplicate(node: onnx.NodeProto) -> onnx.NodeProto:
    copied = onnx.NodeProto()
    copied.CopyFrom(node)
    return copied


def _pruned(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Drop constants that nothing reads any more: they would count as size on disk."""
    read = {name for node in graph.graph.node for name in node.input}
    kept = [tensor for tensor in graph.graph.initializer if tensor.name in read]
    copies = []
    for tensor in kept:
        copied = onnx.TensorProto()
        copied.CopyFrom(tensor)
        copies.append(copied)
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(copies)
    return graph
