"""Names in exported graphs."""

from __future__ import annotations

import onnx

INPUT, OUTPUTS = "images", ("boxes", "scores", "labels")
PREFIX, SUFFIX = "network.", ".weight"
"""Around a layer's module name in the name of its weight, as the exporter writes it."""


def layer_of(node: onnx.NodeProto) -> str | None:
    """The module name of the layer that a Conv or Gemm node runs, by its weight's name."""
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return None
    weight: str = node.input[1]
    if not weight.startswith(PREFIX) or not weight.endswith(SUFFIX):
        return None
    return weight.removeprefix(PREFIX).removesuffix(SUFFIX)
