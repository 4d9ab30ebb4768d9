"""What an engine reaches at best on this machine: the peaks that a roofline's shares refer to."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from evaluators.bench import Bench
from evaluators.calibration import LayerRanges, Range
from evaluators.graph import INPUT, MODEL_FILE, PREFIX, SCOPE, SUFFIX
from evaluators.targets.onnx_target import OnnxTarget
from spaces.errors import InputError

CHANNELS, SIDE, KERNEL = 256, 28, 3
LAYERS = 4
REPEATS = 20
COPIED = 2**16
"""Float32 values: 256 KB, which the caches of a core hold beside a copy."""


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        peak_gmacs: 10^9 multiply-accumulates a second by bit-width.
        bandwidth_gbs: 10^9 bytes a second that a core reads and writes.
    """

    peak_gmacs: Mapping[int, float]
    bandwidth_gbs: float


def machine_limits(bench: Bench) -> Limits:
    """Measured while no worker computes.

    Raises:
        InputError: the target writes no ONNX files.
    """
    if not isinstance(bench.target, OnnxTarget):
        raise InputError("target", bench.config.target, "choose an engine of ONNX files")
    with bench.slot.quiet():
        return Limits(_peak_gmacs(bench.target, bench.config.threads), _copy_bandwidth())


def _peak_gmacs(target: OnnxTarget, threads: int) -> dict[int, float]:
    """10^9 multiply-accumulates a second by bit-width, on 3x3 convolutions of 256 channels at 28 x 28.

    The fastest of 20 runs counts: a peak is what nothing disturbed.
    """
    image = np.random.default_rng(0).uniform(-1, 1, (1, CHANNELS, SIDE, SIDE)).astype(np.float32)
    macs = LAYERS * (CHANNELS * KERNEL * SIDE) ** 2
    peaks = {}
    for width in target.capabilities.bit_widths:
        names = [f"layer{k}" for k in range(LAYERS)]
        span = Range(-1.0, 1.0)
        ranges = dict.fromkeys(names, LayerRanges(span, span)) if width <= 8 else {}
        lowered = target.lower(_convolutions(), dict.fromkeys(names, width), ranges)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / MODEL_FILE
            file.write_bytes(lowered.graph.SerializeToString())
            part = target.prepare_tensor_part(file, threads, lowered.hint)
            seconds = _fastest(partial(part.run, image))
        peaks[width] = macs / seconds / 1e9
    return peaks


def _copy_bandwidth() -> float:
    """10^9 bytes a second that one core reads and writes where its caches hold them."""
    source, sink = np.ones(COPIED, np.float32), np.empty(COPIED, np.float32)
    return 2 * source.nbytes / _fastest(lambda: np.copyto(sink, source)) / 1e9


def _fastest(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _convolutions() -> onnx.ModelProto:
    """Layers one behind the other, named like those of an exported detector."""
    random = np.random.default_rng(0)
    shape = (CHANNELS, CHANNELS, KERNEL, KERNEL)
    spread = 1 / (KERNEL * np.sqrt(CHANNELS))  # keeps the values where they are, from layer to layer
    weights, nodes, source = [], [], INPUT
    for k in range(LAYERS):
        name = f"{PREFIX}layer{k}{SUFFIX}"
        values = random.normal(0, spread, shape).astype(np.float32)
        weights.append(numpy_helper.from_array(values, name))
        sides = {"kernel_shape": [KERNEL] * 2, "pads": [KERNEL // 2] * 4}
        nodes.append(helper.make_node("Conv", [source, name], [f"y{k}"], f"{SCOPE}layer{k}/Conv", **sides))
        source = f"y{k}"
    nodes.append(helper.make_node("Abs", [source], ["boxes"], "/Abs"))  # decoding, which is cut off
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, CHANNELS, SIDE, SIDE])
        for name in (INPUT, "boxes")
    ]
    graph = helper.make_graph(nodes, "peak", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
