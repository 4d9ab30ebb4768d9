"""Small steps that every rewriting of an exported graph is made of."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

Message = TypeVar("Message", onnx.ModelProto, onnx.NodeProto, onnx.TensorProto)


def constant(graph: onnx.ModelProto, name: str, value: NDArray[np.generic]) -> str:
    """Store a constant under a name, once; the name."""
    if not any(tensor.name == name for tensor in graph.graph.initializer):
        graph.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def constants(graph: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Stored tensors by all the names that they are read under.

    Of those that are alike the exporter keeps one; an Identity gives it the names of the others.
    """
    found = {tensor.name: tensor for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        if node.op_type == "Identity" and node.input[0] in found:
            found[node.output[0]] = found[node.input[0]]
    return found


def copied(message: Message) -> Message:
    """A copy to change, of a graph or of a part of one."""
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def replace_nodes(graph: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """Put nodes, old and new ones, in the place of all; types of inner tensors are forgotten."""
    fresh = [copied(node) for node in nodes]
    del graph.graph.node[:]
    graph.graph.node.extend(fresh)
    del graph.graph.value_info[:]


def without_unread(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Drop constants that nothing reads any more, and other names of theirs: they would count as size."""
    read = {name for node in graph.graph.node for name in node.input} | {o.name for o in graph.graph.output}
    stored = constants(graph)
    for node in [node for node in graph.graph.node if node.op_type == "Identity" and node.input[0] in stored]:
        if node.output[0] not in read:
            graph.graph.node.remove(node)
    read = {name for node in graph.graph.node for name in node.input}
    kept = [copied(tensor) for tensor in graph.graph.initializer if tensor.name in read]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)
    return graph
