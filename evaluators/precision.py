"""Typed regions written into an exported graph: bfloat16 where the CPU has it."""

from __future__ import annotations

import ml_dtypes
import onnx
from onnx import TensorProto, helper, numpy_helper

from evaluators.graph import SCOPE, layer_of, readers_of
from evaluators.rewriting import constants, copied, replace_nodes, without_unread

FOLLOWERS = {"Sigmoid", "Mul", "Add", "Relu", "HardSwish", "HardSigmoid", "Clip", "LeakyRelu", "Concat"}
FOLLOWERS |= {"MaxPool", "Resize", "Slice"}
"""Operations that run in bfloat16 between bfloat16 layers. Decoding and suppression stay float32."""
PLACED = {"Resize", "Slice"}
"""Of these only the first input is computed with; the others say where, in types of their own."""


def in_bfloat16(graph: onnx.ModelProto, layers: frozenset[str]) -> onnx.ModelProto:
    """A copy in which the given layers, and what lies between them, compute in bfloat16 whatever the hint.

    Weights are stored in bfloat16, too. An elementwise or copying operation of the network joins where all
    the layers around it are in bfloat16, so that casts stand only at the border of such regions. The
    first and last tensors of the graph stay float32.
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
        for position, name in enumerate(_values(node)):
            if not name:
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
    tensors = constants(graph)
    nodes: list[onnx.NodeProto] = []
    widened: dict[str, str] = {}
    for node in graph.graph.node:
        if layer_of(node) in layers:
            name = node.input[1]
            if name not in widened:  # a head that is shared by levels reads it more than once
                stored, widened[name] = _stored_half(graph, tensors[name]), f"{name}_widened"
                nodes.append(helper.make_node("Cast", [stored], [widened[name]], to=TensorProto.FLOAT))
            node.input[1] = widened[name]
        nodes.append(node)
    replace_nodes(graph, nodes)
    return without_unread(graph)


def _bfloat16_nodes(graph: onnx.ModelProto, layers: frozenset[str]) -> set[str]:
    """Outputs (as keys) of the nodes that run in bfloat16."""
    producers = {name: node for node in graph.graph.node for name in node.output}
    readers = readers_of(graph)
    ends = {output.name for output in graph.graph.output}
    inner = [n for n in graph.graph.node if ends.isdisjoint(n.output)]
    chosen = {_key(n) for n in inner if layer_of(n) in layers}
    followers = [n for n in inner if n.op_type in FOLLOWERS and _of_network(n)]
    # Candidates are dropped until every one left has only bfloat16 sources, and some bfloat16 reader or
    # source: the greatest fixed point, so that whole chains between layers survive together.
    joined = {_key(n) for n in followers}
    changed = True
    while changed:
        changed = False
        for node in followers:
            if _key(node) not in joined:
                continue
            sources = [producers[name] for name in _values(node) if name in producers]
            tensors = [s for s in sources if s.op_type != "Constant"]
            around = {_key(n) for n in tensors} | {_key(n) for name in node.output for n in readers[name]}
            inside = chosen | joined
            if not tensors or not all(_key(s) in inside for s in tensors) or not around & inside:
                joined.discard(_key(node))
                changed = True
    return chosen | joined


def _of_network(node: onnx.NodeProto) -> bool:
    """False for decoding and suppression; what rewriting has put in, without a name, is the network's."""
    return not node.name or node.name.startswith(SCOPE)


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


def _values(node: onnx.NodeProto) -> list[str]:
    """The inputs that a node computes with."""
    return list(node.input[:1] if node.op_type in PLACED else node.input)


def _key(node: onnx.NodeProto) -> str:
    name: str = node.output[0]
    return name
