"""Names in exported graphs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import onnx

MODEL_FILE = "model.onnx"
INPUT, OUTPUTS = "images", ("boxes", "scores", "labels")
PREFIX, SUFFIX = "network.", ".weight"
"""Around a layer's module name in the name of its weight, as the exporter writes it: `(outputs, ...)`."""
TURNED = f"{SUFFIX}_t"
"""Instead of `SUFFIX`, where a product reads the weight as `(inputs, outputs)`, see `evaluators.export`."""
SCOPE = "/network/"
"""Begins the names of the nodes before decoding, as the exporter writes them."""
_LAYERS = ("Conv", "Gemm", "MatMul")
_FUSED = ("Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid")
_SCALING = ("Add", "Mul", "Cast")
_TYPES = ("QuantizeLinear", "DequantizeLinear", "Cast", "Clip")
"""Without a name, they round what layers read: rewriting has put them in."""


def layer_of(node: onnx.NodeProto) -> str | None:
    """The module name of the layer that a Conv, Gemm or MatMul node runs, by its weight's name."""
    if node.op_type not in _LAYERS:
        return None
    weight: str = node.input[1]
    if not weight.startswith(PREFIX) or not weight.endswith((SUFFIX, TURNED)):
        return None
    return weight.removeprefix(PREFIX).removesuffix(TURNED).removesuffix(SUFFIX)


def output_axis(weight: str) -> int:
    """The axis of a weight, or of what it is stored as, that holds a layer's output channels; by its name."""
    return 1 if TURNED in weight else 0


def by_output(values: np.ndarray, weight: np.ndarray, axis: int) -> np.ndarray:
    """Values `(O,)` of the output channels along an axis, with the sides of a weight, all others 1."""
    return values.reshape([-1 if side == axis else 1 for side in range(weight.ndim)])


def scope_of(node: str) -> str:
    """The module that a node was written for, by the node's name: `a.0.b` for `/network/a/a.0/b/MatMul`.

    What holds modules without running them itself may be missing in front; where a module runs again, the
    exporter adds `_1` to it.
    """
    parts: list[str] = []
    for part in node.removeprefix(SCOPE).split("/")[:-1]:
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(part)
    return ".".join(parts)


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
    readers, found = readers_of(graph), {}
    for node in graph.graph.node:
        layer = nodes.get(node.name)
        if layer is None:
            continue
        found[node.output[0]] = layer
        after = readers[node.output[0]]
        if len(after) == 1 and after[0].op_type in _FUSED:
            found[after[0].output[0]] = layer
    return found


def fused_names(graph: onnx.ModelProto, nodes: Mapping[str, str]) -> dict[str, str]:
    """Layers by the names of the additions of constants and multiplications by them that follow.

    OpenVINO takes them into a product and names that after the last of them.

    Args:
        graph: lowered or not.
        nodes: of `layer_nodes`.
    """
    fixed = {tensor.name for tensor in graph.graph.initializer}
    found: dict[str, str] = {}
    made: dict[str, str] = {}
    for node in graph.graph.node:
        moving = [name for name in node.input if name not in fixed]
        if not moving:
            fixed.update(node.output)
        elif node.name in nodes:
            made[node.output[0]] = nodes[node.name]
        elif node.op_type in _SCALING and len(moving) == 1 and moving[0] in made:
            found[node.name] = made[node.output[0]] = made[moving[0]]
    return found


def biased(graph: onnx.ModelProto) -> dict[str, str]:
    """What layers write that are a product and an addition of a bias, by what the product writes."""
    readers, found = readers_of(graph), {}
    for node in graph.graph.node:
        after = readers[node.output[0]] if node.op_type == "MatMul" else []
        if (
            len(after) == 1
            and after[0].op_type == "Add"
            and f"{PREFIX}{layer_of(node)}.bias" in after[0].input
        ):
            found[node.output[0]] = after[0].output[0]
    return found


def readers_of(graph: onnx.ModelProto) -> defaultdict[str, list[onnx.NodeProto]]:
    """The nodes that read each tensor; none of one that nothing reads."""
    readers: defaultdict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.graph.node:
        for name in node.input:
            readers[name].append(node)
    return readers


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
