"""A target that is not at hand: latency from a description of the hardware, boxes from ONNX Runtime."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from evaluators.graph import by_output, layer_of, output_axis
from evaluators.integers import quantized, weight_scales
from evaluators.precision import stored_in_bfloat16
from evaluators.rewriting import constants, copied, replace_nodes, without_unread
from evaluators.signature import machine_signature
from evaluators.targets.base import Detections, Lowered
from evaluators.targets.onnx_target import OnnxTarget, read_graph
from evaluators.targets.onnxruntime_cpu import OnnxRuntime, OnnxRuntimeSession, OnnxRuntimeTensorPart
from evaluators.targets.roofline import Roofline, read_description, roofline, work_of
from spaces.capabilities import Capabilities

if TYPE_CHECKING:  # torch is behind it, which a process that only serves need not load
    from evaluators.calibration import LayerRanges, Range

PREFIX = "analytic:"
VERSION = 2
"""Goes up whenever the same description predicts something else."""
BITS = "paredown.bits"
"""Metadata of the file: bit-widths by layer that are not 32, as JSON."""


class Analytic(OnnxTarget):
    """Hardware described by a YAML file; see `roofline.Description` for its fields.

    Nothing is timed: latencies are computed, the same ones on every machine, and marked as predicted.
    Boxes come from ONNX Runtime on this machine, whose arithmetic stands in for the hardware's: int8 in
    its int8 kernels, 2 to 7 bits rounded to their levels, weights of 16 bits rounded to bfloat16.

    Args:
        description: the YAML file.

    Raises:
        InputError: it cannot be read, or a field is wrong.
    """

    def __init__(self, description: Path) -> None:
        self.name = f"{PREFIX}{description}"
        self.description = read_description(description)

    @property
    def capabilities(self) -> Capabilities:
        """The bit-widths that the description gives a peak for."""
        return self.description.capabilities

    def signature(self, threads: int) -> dict[str, Any]:
        """The description itself, and the machine and the engine that stand in for the hardware."""
        return machine_signature() | {
            "engine": f"analytic {VERSION}",
            "description": json.dumps(self.description.model_dump(), sort_keys=True),
            "scored in": f"onnxruntime {ort.__version__}",
            "threads": threads,
        }

    def lower(
        self, graph: onnx.ModelProto, bits: Mapping[str, int], ranges: Mapping[str, LayerRanges]
    ) -> Lowered:
        """Round to every layer's own number of levels, and note the bit-widths in the file."""
        eight = {layer: ranges[layer] for layer, width in bits.items() if width == 8}
        lowered = few_levels(graph, {layer: w for layer, w in bits.items() if w < 8}, ranges)
        lowered = stored_in_bfloat16(lowered, frozenset(layer for layer, w in bits.items() if w == 16))
        if eight:
            lowered = quantized(lowered, eight, outputs_too=True)
        noted = {layer: width for layer, width in bits.items() if width != 32}
        helper.set_model_props(lowered, {BITS: json.dumps(noted)})
        return Lowered(lowered)

    def prepare(self, model: Path, threads: int, hint: str = "f32") -> AnalyticSession:
        """Raises InputError when the file is missing or not readable as a model. `hint` changes nothing."""
        session = OnnxRuntime().prepare(model, threads)
        graph = read_graph(model)
        noted = {prop.key: prop.value for prop in graph.metadata_props}
        bits = json.loads(noted.get(BITS, "{}"))
        works = work_of(graph, bits, self.description.granule)
        layers = [layer for node in graph.graph.node if (layer := layer_of(node)) is not None]
        runs = {layer: self.description.native(bits.get(layer, 32)) for layer in {*layers, *bits}}
        return AnalyticSession(session, roofline(self.description, works), runs)

    def _outputs_of(self, model: Path, threads: int, hint: str) -> OnnxRuntimeTensorPart:
        return OnnxRuntimeTensorPart(model, threads)


class AnalyticSession:
    """A model scored by ONNX Runtime and timed by nobody."""

    def __init__(self, session: OnnxRuntimeSession, found: Roofline, bits: Mapping[str, int]) -> None:
        self._session, self.roofline, self._bits = session, found, bits

    @property
    def predicted_ms(self) -> float:
        """Latency of one image, milliseconds."""
        return self.roofline.ms

    def run(self, images: NDArray[np.float32]) -> Detections:
        """Whole detector on one preprocessed image `(1, 3, H, W)`, in ONNX Runtime."""
        return self._session.run(images)

    def kernels(self) -> dict[str, str]:
        """What the description counts every layer as: there is no engine to ask."""
        return self._kernels

    @cached_property
    def _kernels(self) -> dict[str, str]:
        return {layer: {32: "f32", 16: "bf16"}.get(width, f"i{width}") for layer, width in self._bits.items()}


def few_levels(
    graph: onnx.ModelProto, bits: Mapping[str, int], ranges: Mapping[str, LayerRanges]
) -> onnx.ModelProto:
    """A copy in which layers read activations and weights of 2 to 7 bits, computed in float32.

    Activations are rounded to 2^b levels of their range, weights symmetrically per output channel to
    2^b - 1, stored as int4 up to 4 bits and as int8 above.

    Args:
        graph: float32; left untouched.
        bits: by layer, 2 to 7.
        ranges: of each of these layers.
    """
    lowered = copied(graph)
    tensors = constants(lowered)
    nodes: list[onnx.NodeProto] = []
    added: list[onnx.TensorProto] = []
    calls: Counter[str] = Counter()
    weights: dict[str, str] = {}
    for node in lowered.graph.node:
        layer, name = layer_of(node), node.input[1] if len(node.input) > 1 else ""
        if layer in bits and layer is not None:
            named = f"{layer}#{calls[layer]}" if calls[layer] else layer  # it may be shared by levels
            calls[layer] += 1
            node.input[0] = _rounded(node.input[0], named, ranges[layer].read, bits[layer], nodes, added)
            learned = ranges[layer] if ranges[layer].weight_scales else None
            if name not in weights:
                weights[name] = _few_weights(tensors[name], bits[layer], learned, nodes, added)
            node.input[1] = weights[name]
        nodes.append(node)
    replace_nodes(lowered, nodes)
    lowered.graph.initializer.extend(added)
    return without_unread(lowered)


def _rounded(
    source: str,
    named: str,
    span: Range,
    bits: int,
    nodes: list[onnx.NodeProto],
    added: list[onnx.TensorProto],
) -> str:
    """The name of a tensor rounded to the levels of a range: cut to it, then through a Q/DQ pair."""
    scale = (span.high - span.low) / (2**bits - 1)
    zero = int(np.clip(round(-span.low / scale), 0, 2**bits - 1))
    ends = (-zero * scale, (2**bits - 1 - zero) * scale)
    names = [f"{named}_{part}" for part in ("low", "high", "scale", "zero")]
    values = [np.array(x, np.float32) for x in (*ends, scale)] + [np.array(zero, np.uint8)]
    added += [numpy_helper.from_array(value, name) for value, name in zip(values, names, strict=True)]
    cut, whole, back = (f"{named}_{part}" for part in ("cut", "whole", "read"))
    nodes.append(helper.make_node("Clip", [source, names[0], names[1]], [cut]))
    nodes.append(helper.make_node("QuantizeLinear", [cut, *names[2:]], [whole]))
    nodes.append(helper.make_node("DequantizeLinear", [whole, *names[2:]], [back]))
    return back


def _few_weights(
    tensor: onnx.TensorProto,
    bits: int,
    learned: LayerRanges | None,
    nodes: list[onnx.NodeProto],
    added: list[onnx.TensorProto],
) -> str:
    """The name of a weight's dequantised form."""
    weight, axis = numpy_helper.to_array(tensor), output_axis(tensor.name)
    most = 2 ** (bits - 1) - 1
    scale = weight_scales(np.moveaxis(weight, axis, 0), most)
    if learned is not None:
        most, scale = learned.largest, np.array(learned.weight_scales, np.float32)
    levels = np.clip(np.round(weight / by_output(scale, weight, axis)), -most, most)
    kind = ml_dtypes.int4 if bits <= 4 else np.int8
    stored, scales, result = (f"{tensor.name}_{part}" for part in ("levels", "scale", "dequantized"))
    added.append(numpy_helper.from_array(levels.astype(kind), stored))
    added.append(numpy_helper.from_array(scale, scales))
    nodes.append(helper.make_node("DequantizeLinear", [stored, scales], [result], axis=axis))
    return result
