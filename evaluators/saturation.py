"""Ends of what a layer writes that the activation function behind makes flat: integers there are wasted."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper

if TYPE_CHECKING:  # torch is behind it
    from evaluators.calibration import Range

SILU_MINIMUM = -1.2784645
"""Where x * sigmoid(x) is smallest; from there it rises towards 0 on the left."""
CANDIDATES = 129


@dataclass(frozen=True)
class Flat:
    """What lies below `low` or above `high` gives one value; `silu` is flat by degrees on the left."""

    low: float = -math.inf
    high: float = math.inf
    silu: bool = False

    def cut(self, span: Range) -> Range:
        """A range without its flat ends, 0 included.

        Nothing is lost by it. SiLU is cut where what it gives on the left differs by half a step of the range
        that remains, so that the cut costs no more than rounding does anyway.
        """
        low, high = max(span.low, min(self.low, 0.0)), min(span.high, max(self.high, 0.0))
        if self.silu and low < SILU_MINIMUM:
            ends = np.linspace(low, SILU_MINIMUM, CANDIDATES)
            left = np.abs(ends / (1 + np.exp(-np.maximum(ends, -80.0))))
            low = float(ends[left - left[0] <= (high - ends) / 510].max())
        return replace(span, low=low, high=high if high - low >= 1e-12 else low + 1e-6)


def flat_ends(graph: onnx.ModelProto) -> dict[str, Flat]:
    """By the name of a tensor that one activation function alone reads: what is flat for it."""
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    constants = {tensor.name: float(numpy_helper.to_array(tensor).item()) for tensor in _scalars(graph)}
    for node in graph.graph.node:
        for name in node.input:
            readers[name].append(node)
    for output in graph.graph.output:
        readers.pop(output.name, None)
    found = {name: _flat(name, nodes, readers, constants) for name, nodes in readers.items()}
    return {name: flat for name, flat in found.items() if flat is not None}


def _flat(
    name: str,
    nodes: Sequence[onnx.NodeProto],
    readers: Mapping[str, Sequence[onnx.NodeProto]],
    constants: Mapping[str, float],
) -> Flat | None:
    first = nodes[0]
    if len(nodes) == 2:
        both = {node.op_type: node for node in nodes}
        if both.keys() != {"Sigmoid", "Mul"}:
            return None
        gate = both["Sigmoid"].output[0]
        silu = set(both["Mul"].input) == {name, gate} and len(readers.get(gate, ())) == 1
        return Flat(silu=True) if silu else None
    if len(nodes) != 1 or first.input[0] != name:
        return None
    if first.op_type == "Relu":
        return Flat(low=0.0)
    if first.op_type == "HardSwish":
        return Flat(low=-3.0)
    if first.op_type == "HardSigmoid":
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in first.attribute}
        alpha, beta = given.get("alpha", 0.2), given.get("beta", 0.5)
        return Flat(-beta / alpha, (1 - beta) / alpha)
    if first.op_type == "Clip":
        ends = [constants.get(end, math.nan) if end else math.nan for end in (*first.input[1:], "", "")]
        low, high = (
            infinite if math.isnan(end) else end
            for end, infinite in zip(ends, (-math.inf, math.inf), strict=False)
        )
        return Flat(low, high)
    return None


def _scalars(graph: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Constants of one number, of the graph itself and of Constant nodes, under the names that are read."""
    found = [tensor for tensor in graph.graph.initializer if math.prod(tensor.dims) == 1]
    for node in graph.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = onnx.TensorProto()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            if math.prod(tensor.dims) == 1:
                found.append(tensor)
    return found
