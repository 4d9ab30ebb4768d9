"""A roofline: how long a model takes on hardware of which only a few figures are known.

Each layer takes the longer of computing and of moving its data (Williams, Waterman and Patterson, Roofline,
CACM 52(4), 2009), and a fixed cost to start; what is not a layer of the network costs a fixed time a image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Annotated, Any

import onnx
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, field_validator

from evaluators.graph import layer_nodes, tensor_part
from spaces.capabilities import Capabilities
from spaces.errors import InputError

_FREE = ("QuantizeLinear", "DequantizeLinear", "Cast", "Constant", "Identity", "Reshape", "Shape", "Clip")
"""Conversions, which the hardware does on the way, views, and bookkeeping of shapes."""
_MOVES = ("Concat", "Slice", "Split", "Resize", "MaxPool", "Transpose")


Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Share = Fraction | dict[int, Fraction]
"""Of a peak, 0..1: at all bit-widths, or by bit-width; 1 at those that are missing."""


class Description(BaseModel):
    """Hardware in a few figures, as a YAML file says them.

    Attributes:
        name: shown in reports.
        peak_gmacs: 10^9 multiply-accumulates a second by bit-width; its keys are the bit-widths that run
            natively, 32 among them, 16 meaning bfloat16, any from 2 to 8.
        bandwidth_gbs: 10^9 bytes a second that layers read and write.
        dense_share: of the peak, that layers reach at best; one figure, or one by bit-width.
        depthwise_share: the same of depthwise layers.
        elementwise_gops: 10^9 elements a second of activation functions and additions; they cost nothing
            where it is not given.
        layer_us: microseconds that starting a layer costs.
        fixed_ms: milliseconds an image for all that is not of the network: decoding and suppression.
        granule: channels are computed in groups of so many; a group that is not full takes as long.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    peak_gmacs: dict[int, PositiveFloat]
    bandwidth_gbs: PositiveFloat
    dense_share: Share = 1.0
    depthwise_share: Share = 1.0
    elementwise_gops: PositiveFloat | None = None
    layer_us: float = Field(default=0.0, ge=0.0)
    fixed_ms: float = Field(default=0.0, ge=0.0)
    granule: int = Field(default=8, ge=1)

    @field_validator("peak_gmacs")
    @classmethod
    def _known_widths(cls, peaks: dict[int, float]) -> dict[int, float]:
        if 32 not in peaks or not set(peaks) <= {32, 16, *range(2, 9)}:
            raise ValueError("name a peak for 32 bits, the base's own, and for any of 16 and 8 to 2")
        return peaks

    def reached(self, bits: int, depthwise: bool) -> float:
        """10^9 multiply-accumulates a second that a layer reaches at best at a native bit-width."""
        share = self.depthwise_share if depthwise else self.dense_share
        return self.peak_gmacs[bits] * (share.get(bits, 1.0) if isinstance(share, dict) else share)

    @property
    def capabilities(self) -> Capabilities:
        """What runs natively."""
        widths = tuple(sorted(self.peak_gmacs, reverse=True))
        return Capabilities(widths, self.granule, writes_integers=True)  # scored by ONNX Runtime

    def native(self, bits: int) -> int:
        """The bit-width that a layer of `bits` runs at: the next one that is there."""
        return min(width for width in self.peak_gmacs if width >= min(bits, 32))


@dataclass(frozen=True)
class Work:
    """What one operation has to do for an image.

    Attributes:
        macs: multiply-accumulates, output channels filled up to the granule.
        elements: read and written, weights included.
        arithmetic: elements that an operation without weights computes.
        bits: bit-width of what is computed and moved.
        depthwise: one filter a channel.
    """

    macs: float
    elements: float
    arithmetic: float
    bits: int
    depthwise: bool = False


@dataclass(frozen=True)
class Roofline:
    """What a model reaches of what the hardware could do.

    Attributes:
        ms: predicted for one image.
        ideal_ms: were the multiply-accumulates at their peaks all there is.
        gmacs: 10^9 multiply-accumulates of an image.
        bound_by_memory: share of the layers that moving data bounds.
    """

    ms: float
    ideal_ms: float
    gmacs: float
    bound_by_memory: float

    @property
    def share(self) -> float:
        """Attained over peak, 0..1."""
        return self.ideal_ms / self.ms

    def described(self) -> dict[str, float]:
        """As plain data: attained and peak in 10^9 multiply-accumulates a second, and their ratio."""
        return {
            "predicted_ms": self.ms,
            "attained_gmacs": self.gmacs / self.ms * 1e3,
            "peak_gmacs": self.gmacs / self.ideal_ms * 1e3,
            "share": self.share,
            "bound_by_memory": self.bound_by_memory,
        }


def read_description(file: Path) -> Description:
    """Raises InputError, naming the field, for a file that cannot be read or describes nothing."""
    try:
        return Description.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError("target description", str(file), f"cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise InputError("target description", str(file), "is no YAML") from None
    except ValidationError as error:
        first = error.errors()[0]
        # Of what follows a field only bit-widths are the user's own words; the rest names pydantic's types.
        where = ".".join(str(p) for k, p in enumerate(first["loc"]) if k == 0 or isinstance(p, int))
        raise InputError(f"{file}: {where}", None, first["msg"].removeprefix("Value error, ")) from None


def work_of(graph: onnx.ModelProto, bits: Mapping[str, int], granule: int) -> list[Work]:
    """What the network of a detector's graph has to do, operation by operation.

    Args:
        graph: as a target wrote it.
        bits: by layer; an operation without weights moves what the layer before it wrote.
        granule: see `Description`.
    """
    inferred = onnx.shape_inference.infer_shapes(tensor_part(graph)).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        sides = tuple(side.dim_value for side in value.type.tensor_type.shape.dim)
        shapes.setdefault(value.name, sides)
    constants = {tensor.name for tensor in inferred.initializer}
    layers, width = layer_nodes(graph), {inferred.input[0].name: 32}
    works = []
    for node in inferred.node:
        output = node.output[0]
        layer = layers.get(node.name)
        before = max((width[name] for name in node.input if name in width), default=32)
        width[output] = before if layer is None else bits.get(layer, 32)
        read = [name for name in node.input if name not in constants]
        moved = sum(_elements(shapes, name) for name in (*read, output))
        if layer is not None:
            works.append(_layer_work(node, shapes, width[output], granule))
        elif node.op_type in _MOVES:
            works.append(Work(0.0, moved, 0.0, before))
        elif node.op_type not in _FREE and moved:
            works.append(Work(0.0, 0.0, _elements(shapes, output), before))
    return works


def roofline(description: Description, works: Sequence[Work]) -> Roofline:
    """Time of all operations, one after another."""
    ms, ideal, bound, layers = description.fixed_ms, 0.0, 0, 0
    for work in works:
        width = description.native(work.bits)
        computing = work.macs / description.reached(width, work.depthwise) / 1e6
        moving = work.elements * width / 8 / description.bandwidth_gbs / 1e6
        ms += max(computing, moving)
        if work.arithmetic:
            if description.elementwise_gops is not None:
                ms += work.arithmetic / description.elementwise_gops / 1e6
            continue
        ms += description.layer_us / 1e3
        if work.macs:
            ideal += work.macs / description.peak_gmacs[width] / 1e6
            layers += 1
            bound += moving > computing
    gmacs = sum(work.macs for work in works) / 1e9
    return Roofline(ms, ideal, gmacs, bound / max(layers, 1))


def _layer_work(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]], bits: int, granule: int) -> Work:
    source, output = shapes[node.input[0]], shapes[node.output[0]]
    weight = shapes.get(node.input[1], ())
    if node.op_type == "Conv":
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        groups = int(attributes.get("group", 1))
        kernel = _product(attributes.get("kernel_shape") or weight[2:])
        positions, channels = _product(output[2:]), output[1]
        filters = source[1] // groups * kernel
        depthwise = groups > 1 and source[1] == groups
    else:
        positions, channels, depthwise = _product(output[:-1]), output[-1], False
        filters = source[-1]
    filled = ceil(channels / granule) * granule
    moved = _product(source) + _product(output) + channels * filters
    return Work(float(filled * filters * positions), float(moved), 0.0, bits, depthwise)


def _elements(shapes: Mapping[str, tuple[int, ...]], name: str) -> float:
    return float(_product(shapes[name])) if shapes.get(name) else 0.0


def _product(sides: Any) -> int:
    result = 1
    for side in sides:
        result *= int(side)
    return result
