"""Weights of few distinct values stored in few bits, unpacked by the engine when it loads the file."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from evaluators.graph import PREFIX, SUFFIX, output_axis
from evaluators.rewriting import constant, copied, replace_nodes, without_unread

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Widths of the pieces that an index of so many bits is stored in: each divides a byte."""
NODE_BYTES = 400
STREAM_BYTES = 5000
"""About what unpacking takes in the file: operations and names for each weight; once a width, the tables."""


@dataclass(frozen=True)
class _Indexed:
    """A constant as indices `(n,)` into its distinct values, of `bits` bits each.

    Attributes:
        powers: what the values of each output channel are multiplied by, with the sides of the tensor, all
            others 1; None for 1.
    """

    tensor: onnx.TensorProto
    indices: NDArray[np.int64]
    values: NDArray[np.generic]
    bits: int
    saved: float
    powers: NDArray[np.generic] | None = None


def packed(graph: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, int]]:
    """A copy that stores weights of at most 256 distinct values as packed indices, and the bits of each.

    In float weights the values of an output channel may all be multiplied by a power of two.

    The indices of all weights of one width lie in one stream of bytes. A byte is turned into the indices
    that it holds by a small table (Gather), which engines compute once, when they load the file: OpenVINO
    and ONNX Runtime were seen to run the same kernels as without packing, int8 ones included. (OpenVINO
    2026.4 does not do so with INT4 constants behind DequantizeLinear, nor with BitShift and BitwiseAnd: the
    layer then runs in float32.) A weight that would not become smaller stays as it is.

    Args:
        graph: lowered; left untouched.

    Returns:
        The graph, and the bits of an index by module name of the layers that are packed.
    """
    graph = copied(graph)
    found_by_width: dict[int, list[_Indexed]] = defaultdict(list)
    for tensor in graph.graph.initializer:
        found = _indexed(tensor) if _layer(tensor.name) is not None else None
        if found is not None:
            found_by_width[found.bits].append(found)
    bits: dict[str, int] = {}
    unpacking: list[onnx.NodeProto] = []
    streams = {
        width: members
        for width, members in sorted(found_by_width.items())
        if sum(member.saved for member in members) > STREAM_BYTES
    }
    for width, members in streams.items():
        unpacking += _stream(graph, width, members)
        bits.update({_layer(member.tensor.name) or "": width for member in members})
    if not bits:
        return graph, {}
    nodes = unpacking + list(graph.graph.node)
    gone = {member.tensor.name for members in streams.values() for member in members}
    kept = [tensor for tensor in graph.graph.initializer if tensor.name not in gone]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)
    replace_nodes(graph, nodes)
    return without_unread(graph), bits


def pack(numbers: NDArray[np.integer], width: int) -> NDArray[np.uint8]:
    """Numbers `(n,)` of `width` (1, 2, 4, 8) bits as bytes `(ceil(n * width / 8),)`, lowest bits first."""
    each = 8 // width
    filled = np.concatenate([numbers, np.zeros(-len(numbers) % each, numbers.dtype)]).reshape(-1, each)
    bytes_: NDArray[np.uint8] = (filled.astype(np.int64) << (width * np.arange(each))).sum(1).astype(np.uint8)
    return bytes_


def byte_table(width: int) -> NDArray[np.uint8]:
    """The numbers of `width` bits that each byte holds, `(256, 8 / width)`: what undoes `pack`."""
    shifts = width * np.arange(8 // width)
    table: NDArray[np.uint8] = ((np.arange(256)[:, None] >> shifts) & (2**width - 1)).astype(np.uint8)
    return table


def _layer(name: str) -> str | None:
    """The layer that a constant is the weight of; scales and zero points are not."""
    module, suffix, ending = name.removeprefix(PREFIX).rpartition(SUFFIX)
    known = ending.removeprefix("_t") in ("", "_s8", "_bf16")
    return module if suffix and name.startswith(PREFIX) and known else None


def _indexed(tensor: onnx.TensorProto) -> _Indexed | None:
    """None where packing saves nothing."""
    if tensor.data_type not in (TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.INT8):
        return None
    array = numpy_helper.to_array(tensor)
    ways = [_distinct(tensor, array, None)]
    if tensor.data_type != TensorProto.INT8 and array.ndim > 1:
        import torch  # here, for a process that only serves need not load it: seconds, in every trial

        from spaces.methods.codebook import powers_of_two

        outputs_first = np.moveaxis(array.astype(np.float32), output_axis(tensor.name), 0)
        powers = powers_of_two(torch.from_numpy(outputs_first)).numpy().astype(array.dtype)
        powers = np.moveaxis(powers, 0, output_axis(tensor.name))
        ways.append(_distinct(tensor, array / powers, powers))
    best = max(filter(None, ways), key=lambda way: way.saved, default=None)
    return best if best is not None and best.saved > 0 else None


def _distinct(
    tensor: onnx.TensorProto, array: NDArray[Any], powers: NDArray[np.generic] | None
) -> _Indexed | None:
    """None where there are too many distinct values."""
    if len(np.unique(array.reshape(-1)[:1024])) > 256:
        return None
    values, indices = np.unique(array, return_inverse=True)
    bits = max(int(len(values) - 1).bit_length(), 1)
    if bits > (6 if tensor.data_type == TensorProto.INT8 else 8):  # whole bytes stay readable as they are
        return None
    saved = array.nbytes - bits * array.size / 8 - values.nbytes - NODE_BYTES
    saved -= 0 if powers is None else powers.nbytes
    return _Indexed(tensor, indices.reshape(-1), values, bits, saved, powers)


def _stream(graph: onnx.ModelProto, bits: int, members: list[_Indexed]) -> list[onnx.NodeProto]:
    """Store the indices of some weights; the operations that bring the weights back under their own names."""
    nodes: list[onnx.NodeProto] = []
    indices = np.concatenate([member.indices for member in members])
    name, shift, parts = f"packed{bits}", 0, []
    count = constant(graph, f"{name}_count", np.array([len(indices)]))
    first, flat = (
        constant(graph, "packed_first", np.array([0])),
        constant(graph, "packed_flat", np.array([-1])),
    )

    def add(kind: str, inputs: list[str], output: str, **attributes: int) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    for width in PLANES[bits]:
        part = f"{name}_{width}"
        digits = (indices >> shift) & (2**width - 1)
        stored = constant(graph, f"{part}_bytes", pack(digits, width))
        wide = add("Cast", [stored], f"{part}_wide", to=TensorProto.INT32)
        if width < 8:
            table = constant(graph, f"packed_table{width}", byte_table(width))
            rows = add(
                "Cast", [add("Gather", [table, wide], f"{part}_rows")], f"{part}_ints", to=TensorProto.INT32
            )
            wide = add("Reshape", [rows, flat], f"{part}_flat")
        cut = add("Slice", [wide, first, count], f"{part}_cut")
        factor = constant(graph, f"packed_times{2**shift}", np.array(2**shift, np.int32))
        parts.append(add("Mul", [cut, factor], f"{part}_shifted") if shift else cut)
        shift += width
    total = parts[0]
    for k, part in enumerate(parts[1:]):
        total = add("Add", [total, part], f"{name}_sum{k}")
    pieces = [total]
    if len(members) > 1:
        sizes = constant(graph, f"{name}_sizes", np.array([len(member.indices) for member in members]))
        pieces = [f"{member.tensor.name}_index" for member in members]
        nodes.append(helper.make_node("Split", [total, sizes], pieces, axis=0))
    for member, piece in zip(members, pieces, strict=True):
        tensor = member.tensor
        shape = constant(graph, f"packed_shape_{'x'.join(map(str, tensor.dims))}", np.array(tensor.dims))
        shaped = add("Reshape", [piece, shape], f"{tensor.name}_indices")
        # Integer weights of one width mostly have the same values: their table is stored once.
        shared = tensor.data_type == TensorProto.INT8
        ends = "_".join(str(int(v)) for v in (member.values[0], member.values[-1])) if shared else ""
        whole = shared and len(member.values) == int(member.values[-1]) - int(member.values[0]) + 1
        table = constant(graph, f"packed_levels_{ends}" if whole else f"{tensor.name}_values", member.values)
        if member.powers is None:
            add("Gather", [table, shaped], tensor.name)
        else:
            powers = constant(graph, f"{tensor.name}_powers", member.powers)
            add("Mul", [add("Gather", [table, shaped], f"{tensor.name}_entries"), powers], tensor.name)
    return nodes
