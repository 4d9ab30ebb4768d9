"""Names in exported graphs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import onnx

MODEL_FILE = "model.onnx"
INPUT, OUTPUTS = "images", ("boxes", "scores", "labels")
PREFIX, SUFFIX = "network.", ".weight"
"""Around a layer's module name in the name of its weight, as the exporter writes it."""
SCOPE = "/network/"
"""Begins the names of the nodes before decoding, as the exporter writes them."""
_LAYERS = ("Conv", "Gemm", "MatMul")
_FUSED = ("Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid")
_TYPES = ("QuantizeLinear", "DequantizeLinear", "Cast")


def layer_of(node: onnx.NodeProto) -> str | None:
    """The module name of the layer that a Conv or Gemm node runs, by its weight's name."""
    if node.op_type not in _LAYERS:
        return None
    weight: str = node.input[1]
    if not weight.startswith(PREFIX) or not weight.endswith(SUFFIX):
        return None
    return weight.removeprefix(PREFIX).removesuffix(SUFFIX)


def layer_nodes(graph: onnx.ModelProto) -> dict[str, str]:
    """Module names of layers by the name of the node that runs them, in a lowered graph, too.

    There a weight comes out of a chain of operations, of which some tensor is named after it.
    """
    producers = {name: node for node in graph.graph.node for name in node.output}
    found = {}
    for node in graph.graph.node:
        if node.op_type not in _LAYERS:
            continue
        name = node.input[1]
        while not _of_weight(name) and name in producers and producers[name].input:
            name = producers[name].input[0]
        if _of_weight(name):
            found[node.name] = name.removeprefix(PREFIX).rpartition(SUFFIX)[0]
    return found


def layer_outputs(graph: onnx.ModelProto, nodes: Mapping[str, str]) -> dict[str, str]:
    """Layers by the tensor that they produce, and by that of a function of it alone, which may be fused.

    Args:
        graph: lowered or not.
        nodes: of `layer_nodes`.
    """
    readers = defaultdict(list)
    for node in graph.graph.node:
        for name in node.input:
            readers[name].append(node)
    found = {}
    for node in graph.graph.node:
        layer = nodes.get(node.name)
        if layer is None:
            continue
        found[node.output[0]] = layer
        after = readers[node.output[0]]
        if len(after) == 1 and after[0].op_type in _FUSED:
            found[after[0].output[0]] = layer
    return found


def _of_weight(name: str) -> bool:
    return name.startswith(PREFIX) and SUFFIX in name


def tensor_part(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The graph up to the raw outputs of the network: without decoding and suppression.

    Its outputs are the tensors that leave the network's own nodes, behind their Q/DQ pairs and casts.
    """
    nodes = list(graph.graph.node)
    producers = {name: node for node in nodes for name in node.output}

    def inside(name: str) -> bool:
        while name in producers and producers[name].op_type in _TYPES and not producers[name].name:
            name = producers[name].input[0]
        return name in producers and producers[name].name.startswith(SCOPE)

    borders = {
        name: None
        for node in nodes
        if not node.name.startswith(SCOPE) and (node.name or node.op_type not in _TYPES)
        for name in node.input
        if inside(name)
    }
    needed, waiting = set(), list(borders)
    while waiting:
        node = producers.get(waiting.pop())
        if node is not None and node.output[0] not in needed:
            needed.add(node.output[0])
            waiting += node.input
    kept = [node for node in nodes if node.output[0] in needed]
    read = {name for node in kept for name in node.input}
    cut = onnx.helper.make_graph(
        kept,
        "tensor part",
        list(graph.graph.input),
        [onnx.ValueInfoProto(name=name) for name in borders],
        [tensor for tensor in graph.graph.initializer if tensor.name in read],
    )
    made = onnx.helper.make_model(cut, opset_imports=list(graph.opset_import))
    made.ir_version = graph.ir_version
    return made
