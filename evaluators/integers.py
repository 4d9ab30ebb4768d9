"""Int8 written into an exported graph: Q/DQ pairs, the way that the engines' kernels want them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from evaluators.graph import SCOPE, biased, by_output, layer_of, output_axis, readers_of
from evaluators.rewriting import constant, constants, copied, replace_nodes, without_unread

if TYPE_CHECKING:  # torch is behind it
    from evaluators.calibration import LayerRanges, Range

Grid = tuple[NDArray[np.float32], NDArray[np.uint8]]
"""Scales and zero points, of a tensor or of its channels."""
FULL_LEVELS = 127
WEIGHT_CLIPS = np.linspace(1.0, 0.3, 36)
LARGEST_BIAS = 2**30
"""Of what integer kernels add in 32 bits; products need the rest."""
COPYING = {"Concat", "MaxPool", "Resize", "Reshape", "Transpose", "Flatten", "Slice", "Identity"}
ELEMENTWISE = {"Mul", "Add", "Relu", "Clip", "HardSwish", "HardSigmoid", "Sigmoid"}
"""What may read channels that were written with a scale each, in ONNX Runtime: it makes no integer operation
with one scale of these, or of a sigmoid only where a layer reads that. Of other ones it may."""


@dataclass(frozen=True)
class Reading:
    """How a tensor is rounded: its range, or that of each channel, and in how many levels.

    `exact` where no other layer's range of the same tensor will do.
    """

    spans: tuple[Range, ...]
    levels: int = 256
    exact: bool = False

    def alike(self, other: Reading) -> bool:
        """True where both are of the whole tensor, or both of its channels, in as many levels."""
        if self.exact or other.exact:
            return self == other
        return self.levels == other.levels and len(self.spans) == len(other.spans)

    @property
    def grids(self) -> Grid:
        """Scales and zero points `(C,)`; `(1,)` of the whole tensor."""
        scales, zeros = zip(*(span.grid(self.levels) for span in self.spans), strict=True)
        return np.array(scales, np.float32), np.array(zeros, np.uint8)


def quantized(
    graph: onnx.ModelProto,
    layers: Mapping[str, LayerRanges],
    outputs_too: bool,
    weight_levels: int = FULL_LEVELS,
    plain_pairs: bool = False,
) -> onnx.ModelProto:
    """A copy in which the given layers read integer activations and weights, in bytes whatever their levels.

    Activations are U8 with one scale and zero point, or one a channel where the ranges say so; weights S8
    symmetric with one scale a channel: what the engines' kernels want. Fewer than 256 levels of an activation
    are the lowest ones, what lies above is clipped. Layers that read the same tensor in the same way share
    its Q/DQ pair.

    Args:
        graph: float32.
        layers: ranges of the layers to quantise, by module name.
        outputs_too: as ONNX Runtime wants it: what the layers produce is quantised as well, for it fuses
            only such layers, and its kernels have one scale a tensor, so those of channels are taken into
            the scales of weights. OpenVINO would lose accuracy for nothing.
        weight_levels: of weights to either side of 0, see `evaluators.signature.int8_weight_levels`; a
            layer may ask for fewer.
        plain_pairs: where channels have a scale each, QuantizeLinear and DequantizeLinear still have one, and
            a multiplication (and an addition) beside them does the rest. ONNX Runtime's kernels with an axis
            are not vectorised: 129 of the 150 ms of YOLOX-nano with all its convolutions in int8.
    """
    graph = copied(graph)
    writer = _Writer(graph, weight_levels, plain_pairs)
    apart = written_apart(graph, layers) if outputs_too else frozenset()
    sums, unrounded = biased(graph), dict[str, Reading]()
    renamed: dict[str, str] = {}
    for node in graph.graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = renamed.get(name, name)
        layer, produced = layer_of(node), node.output[0]
        if layer is None or layer not in layers:
            writer.nodes.append(node)
        else:
            ranges = layers[layer]
            folded, step = writer.read(node, ranges, outputs_too)
            lowest = np.zeros(1)
            if outputs_too:
                writing = Reading((layer in apart and ranges.written_by_channel) or (ranges.written,))
                folded = folded * writer.shift(node, writing)
                lowest = writer.lowest_scales(node, step) / folded
                unrounded[sums.get(produced, produced)] = writing
            writer.weigh(node, ranges, folded, lowest)
        if produced in unrounded:
            renamed[produced] = writer.written(node, unrounded[produced])
    replace_nodes(graph, writer.nodes)
    return without_unread(graph)


class _Writer:
    """The nodes of a graph as they are written anew."""

    def __init__(self, graph: onnx.ModelProto, weight_levels: int, plain_pairs: bool) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._graph, self._levels, self._plain = graph, weight_levels, plain_pairs
        self._tensors = constants(graph)
        self._pairs: dict[tuple[str, Reading], str] = {}
        self._weights: dict[tuple[str, bytes, bytes], str] = {}
        self._scales: dict[str, NDArray[np.float32]] = {}
        self._integers: dict[str, NDArray[np.int8]] = {}
        self._written: dict[str, float] = {}

    def read(
        self, node: onnx.NodeProto, ranges: LayerRanges, one_scale: bool
    ) -> tuple[NDArray[np.float64], float]:
        """Round what a layer reads.

        Returns:
            Factors `(outputs,)` or `(1,)` by which its weights make up for it, and the scale of what it gets,
            the largest one where channels have their own.
        """
        source = node.input[0]
        learned = bool(ranges.weight_scales)
        reading = Reading(ranges.by_channel or (ranges.read,), ranges.levels, exact=learned)
        # What a layer wrote in 8 bits is not rounded again by whoever reads it in 8.
        if source in self._written and reading.levels == 256 and not ranges.by_channel:
            return np.ones(1), self._written[source]
        # Layers that read one tensor were calibrated on samples of it: the first one's range serves.
        place = next((p for p in self._pairs if p[0] == source and p[1].alike(reading)), (source, reading))
        grid = scales, zeros = place[1].grids
        one = (scales.max(keepdims=True), zeros[:1]) if one_scale and len(scales) > 1 else grid
        if place not in self._pairs:
            ending = "" if not any(p[0] == source for p in self._pairs) else f"_{len(self._pairs)}"
            clipped = self._clipped(f"{source}{ending}", source, place[1])
            self._pairs[place] = self._pair(f"{source}{ending}", clipped, grid, one, _rank(node))
        node.input[0] = self._pairs[place]
        return (scales / one[0]).astype(np.float64), float(one[0].max())

    def shift(self, node: onnx.NodeProto, writing: Reading) -> NDArray[np.float64]:
        """Make a layer's channels ready to be written with one scale; what its weights are multiplied by.

        A kernel that writes bytes `round(y / S)` writes `round(y_c / s_c) + z_c` when its weights are
        multiplied by `S / s_c` and its bias becomes `(b_c / s_c + z_c) S`.
        """
        scales, zeros = (grid.astype(np.float64) for grid in writing.grids)
        if len(scales) == 1:
            return np.ones(1)
        factors: NDArray[np.float64] = scales.max() / scales
        biased = len(node.input) > 2 and node.input[2] != ""
        bias = numpy_helper.to_array(self._tensors[node.input[2]]) if biased else np.zeros(len(scales))
        shifted = (bias * factors + zeros * scales.max()).astype(np.float32)
        name = constant(self._graph, f"{node.output[0]}_bias", shifted)
        self._tensors[name] = numpy_helper.from_array(shifted, name)
        del node.input[2:]
        node.input.append(name)
        return factors

    def lowest_scales(self, node: onnx.NodeProto, step: float) -> NDArray[np.float64]:
        """Scales `(outputs,)` or `(1,)` that a layer's weights need for its bias to fit into its kernel.

        The kernel adds the bias as an integer of 32 bits, in steps of the scale of what it reads times that
        of a weight. Where a channel has no weights to speak of (a BatchNorm's gain of 0, folded in), these
        would be so small that its bias overflows.
        """
        if len(node.input) < 3 or node.input[2] not in self._tensors:
            return np.zeros(1)
        bias = numpy_helper.to_array(self._tensors[node.input[2]]).astype(np.float64)
        lowest: NDArray[np.float64] = np.abs(bias) / (step * LARGEST_BIAS)
        return lowest

    def weigh(
        self,
        node: onnx.NodeProto,
        ranges: LayerRanges,
        factors: NDArray[np.float64],
        lowest: NDArray[np.float64],
    ) -> None:
        """Store the layer's weight as S8 with a scale per output channel, and run the layer on it.

        Args:
            node: of the layer.
            ranges: its own.
            factors: `(outputs,)` or `(1,)`: what scales are multiplied by once the weight is rounded.
            lowest: as many: what scales are at least.
        """
        name, levels = node.input[1], min(ranges.largest, self._levels)
        scale = np.maximum(self._scales_of(name, ranges, levels), lowest).astype(np.float32)
        key = (name, scale.tobytes(), factors.tobytes())
        if key not in self._weights:
            ending = f"_{len(self._weights)}" if any(k[0] == name for k in self._weights) else ""
            weight, axis = numpy_helper.to_array(self._tensors[name]), output_axis(name)
            rounded = np.round(weight / by_output(scale, weight, axis))
            integers = np.clip(rounded, -levels, levels).astype(np.int8)
            alike = np.array_equal(self._integers.setdefault(name, integers), integers)
            names = [
                constant(self._graph, f"{name}{'' if alike else ending}_s8", integers),
                constant(self._graph, f"{name}{ending}_scale", (scale * factors).astype(np.float32)),
                constant(self._graph, f"{name}_zero", np.zeros(scale.shape, np.int8)),
            ]
            self._weights[key] = f"{name}{ending}_dequantized"
            self.nodes.append(helper.make_node("DequantizeLinear", names, [self._weights[key]], axis=axis))
        node.input[1] = self._weights[key]
        self.nodes.append(node)

    def _scales_of(self, name: str, ranges: LayerRanges, levels: int) -> NDArray[np.float32]:
        """Scales `(outputs,)` of a weight, found once however often its layer runs."""
        if name not in self._scales:
            weight = numpy_helper.to_array(self._tensors[name])
            scales = weight_scales(np.moveaxis(weight, output_axis(name), 0), levels)
            if ranges.weight_scales:  # learned, perhaps on a CPU that bears more levels
                scales = np.array(ranges.weight_scales, np.float32) * np.float32(ranges.largest / levels)
            self._scales[name] = scales
        return self._scales[name]

    def written(self, node: onnx.NodeProto, writing: Reading) -> str:
        """Round what a layer produces; the name of what its readers get."""
        grid, produced = writing.grids, node.output[0]
        if len(writing.spans) > 1:
            one = (grid[0].max(keepdims=True), np.zeros(1, np.uint8))
            return self._pair(produced, produced, one, grid, _rank(node))
        result = self._pair(produced, produced, grid, grid)
        self._written[result] = float(grid[0][0])
        return result

    def _clipped(self, name: str, source: str, reading: Reading) -> str:
        """Cut a tensor to fewer than 256 levels: the engines' own clipping is that of a byte."""
        if reading.levels == 256:
            return source
        ((scale,), (zero,)) = reading.grids
        ends = {"low": -float(zero) * scale, "high": (reading.levels - 1 - float(zero)) * scale}
        bounds = [
            constant(self._graph, f"{name}_clipped_{end}", np.array(x, np.float32)) for end, x in ends.items()
        ]
        self.nodes.append(helper.make_node("Clip", [source, *bounds], [f"{name}_clipped"]))
        return f"{name}_clipped"

    def _pair(self, name: str, source: str, down: Grid, up: Grid, rank: int = 4) -> str:
        """Add QuantizeLinear and DequantizeLinear, each with its own grid; the name of what comes out."""
        if self._plain and up is not down:
            return self._plain_pair(name, source, down, up, rank)
        bytes_, result = f"{name}_u8", f"{name}_dequantized"
        ending = "" if up is down else "_up"
        self._rounding("QuantizeLinear", [source, bytes_], name, down)
        self._rounding("DequantizeLinear", [bytes_, result], f"{name}{ending}", up)
        return result

    def _plain_pair(self, name: str, source: str, down: Grid, up: Grid, rank: int) -> str:
        """The same as `_pair` where one of the grids is of channels, with one scale in both operations.

        `round(x / s_c) + z` is `round((x S / s_c) / S) + z`; `(q - z_c) s_c` is `(q S) s_c / S - z_c s_c`.
        """
        (channels, zeros), one = (down, up) if len(down[0]) > 1 else (up, down)
        ratio = (channels / one[0]).astype(np.float64)
        if down is not one:
            source = self._by_channel("Mul", source, f"{name}_scaled", 1.0 / ratio, rank)
        bytes_, result = f"{name}_u8", f"{name}_dequantized"
        self._rounding("QuantizeLinear", [source, bytes_], name, one)
        self._rounding("DequantizeLinear", [bytes_, result], name, one)
        if up is not one:
            result = self._by_channel("Mul", result, f"{result}_scaled", ratio, rank)
            if zeros.any():
                shift = -zeros.astype(np.float64) * channels
                result = self._by_channel("Add", result, f"{result}_shifted", shift, rank)
        return result

    def _by_channel(self, kind: str, source: str, result: str, values: NDArray[np.float64], rank: int) -> str:
        """Add an operation of a tensor `(N, C, ...)` of a rank with a value `(C,)` for each channel."""
        shape = (1, -1) + (1,) * (rank - 2)
        name = constant(self._graph, f"{result}_by", values.astype(np.float32).reshape(shape))
        # Named as the network's own, which the tensor part of a file ends with.
        self.nodes.append(helper.make_node(kind, [source, name], [result], name=f"{SCOPE}{result}"))
        return result

    def _rounding(self, kind: str, ends: list[str], name: str, grid: Grid) -> None:
        """Add one of the two operations."""
        one = len(grid[0]) == 1
        scales, zeros = (values.reshape(()) if one else values for values in grid)
        names = [constant(self._graph, f"{name}_scale", scales), constant(self._graph, f"{name}_zero", zeros)]
        axis = {} if one else {"axis": 1}
        self.nodes.append(helper.make_node(kind, [ends[0], *names], ends[1:], **axis))


def _rank(layer: onnx.NodeProto) -> int:
    """Of what a layer reads and writes."""
    return 4 if layer.op_type == "Conv" else 2


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


def written_apart(graph: onnx.ModelProto, layers: Collection[str]) -> frozenset[str]:
    """Layers whose readers bear a scale for each channel that the layer writes.

    Other layers in integers do not, for their kernels have one scale for all channels that they read. Nor do
    the readers of a product whose bias is added by an operation of its own.
    """
    readers = readers_of(graph)

    def bears(node: onnx.NodeProto) -> bool:
        if node.op_type == "Sigmoid":
            return not any(layer_of(reader) in layers for reader in readers[node.output[0]])
        return layer_of(node) not in layers and node.op_type in COPYING | ELEMENTWISE

    found: dict[str, bool] = {}
    for node in graph.graph.node:
        layer = layer_of(node)
        if layer in layers and layer is not None:
            held = node.op_type != "MatMul" and all(map(bears, readers[node.output[0]]))
            found[layer] = found.get(layer, True) and held
    return frozenset(layer for layer, borne in found.items() if borne)
