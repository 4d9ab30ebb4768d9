"""OpenVINO on this machine's CPU."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import openvino as ov
from numpy.typing import NDArray

from evaluators.integers import quantized
from evaluators.precision import in_bfloat16, stored_in_bfloat16
from evaluators.signature import int8_weight_levels, machine_signature
from evaluators.targets.base import Detections, Lowered
from evaluators.targets.onnx_target import OnnxTarget, by_layer
from spaces.capabilities import Capabilities
from spaces.errors import InputError

if TYPE_CHECKING:  # torch is behind it, which a process that only serves need not load
    from evaluators.calibration import LayerRanges

KERNELS = {
    *("Convolution", "GroupConvolution", "MatMul", "FullyConnected"),
    *("FullyConnectedQuantized", "FullyConnectedQuantizedLegacy", "FullyConnectedCompressed"),
}
"""The plugin's names of convolutions and products."""
APART = "/WithoutBiases"
"""What it adds to the name of a convolution."""


@cache
def engine() -> ov.Core:
    """The one OpenVINO of this process, which lives as long as the process.

    Where the CPU has AMX each one puts a signal stack of its own in the place of the last. Two that do not
    end in the reverse order of their beginning leave a stack that is unmapped (plugin.cpp, SigAltStackSetup),
    and the next signal, a child's end will do, kills the process without a word.
    """
    return ov.Core()


class OpenVino(OnnxTarget):
    """The CPU plugin, latency mode, one stream.

    The hint is part of what is measured: without one the plugin silently computes in bfloat16 where the
    CPU has it. `f32` runs a file exactly as typed, `bf16` every layer that is not int8 in bfloat16.
    """

    name = "openvino"

    @cached_property
    def capabilities(self) -> Capabilities:
        """What the plugin reports for this CPU: where it has no bfloat16, that would run as float32."""
        able = engine().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        widths = {32: "FP32", 16: "BF16", 8: "INT8"}
        native = tuple(bits for bits, kind in widths.items() if kind in able)
        return Capabilities(native, channel_granule=8, depthwise_by_channel=True, fuses_elementwise=True)

    def signature(self, threads: int) -> dict[str, Any]:
        """Machine, engine and version, threads; precision hints are each file's own."""
        return machine_signature() | {"engine": f"openvino {ov.__version__}", "threads": threads}

    def lower(
        self, graph: onnx.ModelProto, bits: Mapping[str, int], ranges: Mapping[str, LayerRanges]
    ) -> Lowered:
        """Int8 as Q/DQ around the layer alone; bfloat16 by types in the graph.

        Where no layer is in float32 the hint does the latter instead, and only then does the file depend on
        it: a Q/DQ pair between typed regions costs two casts, and what is no layer, such as activations that
        are not fused, would go to float32 and back (all layers of SSDLite in bfloat16 take .68 of float32's
        time by types, .66 by the hint).
        """
        narrow = {layer: ranges[layer] for layer, width in bits.items() if width <= 8}
        half = frozenset(layer for layer, width in bits.items() if width == 16)
        wide = [layer for layer, width in bits.items() if width > 16]
        if narrow:
            graph = quantized(graph, narrow, outputs_too=False, weight_levels=int8_weight_levels())
        if not half:
            return Lowered(graph)
        if not wide:
            return Lowered(stored_in_bfloat16(graph, half), hint="bf16")
        return Lowered(in_bfloat16(graph, half))

    def prepare(self, model: Path, threads: int, hint: str = "f32") -> OpenVinoSession:
        """Raises InputError when the file is missing or not readable as a model."""
        if not model.is_file():
            raise InputError("model", str(model), "no such file")
        try:
            return OpenVinoSession(model, threads, hint)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise InputError("model", str(model), f"OpenVINO cannot load it ({reason})") from None

    def _outputs_of(self, model: Path, threads: int, hint: str) -> OpenVinoTensorPart:
        return OpenVinoTensorPart(model, threads, hint)


class OpenVinoSession:
    """A compiled model with one inference request."""

    def __init__(self, model: Path, threads: int, hint: str) -> None:
        self._model, self._settings = model, _settings(threads, hint)
        compiled = engine().compile_model(str(model), "CPU", self._settings)
        self._request = compiled.create_infer_request()
        names = {name: k for k, output in enumerate(compiled.outputs) for name in output.get_names()}
        self._places = tuple(names[name] for name in ("boxes", "scores", "labels"))

    def run(self, images: NDArray[np.float32]) -> Detections:
        """Whole detector on one preprocessed image `(1, 3, H, W)`."""
        request = self._request
        request.infer([images], share_inputs=True)
        boxes, scores, labels = (request.get_output_tensor(place).data.copy() for place in self._places)
        return Detections(boxes, scores, labels)

    def kernels(self) -> dict[str, str]:
        """Executed precision (`i8`, `bf16`, `f32`) of each convolution and product."""
        return self._profile

    @cached_property
    def _profile(self) -> dict[str, str]:
        settings = self._settings | {"PERF_COUNT": True}
        request = engine().compile_model(str(self._model), "CPU", settings).create_infer_request()
        shape = request.get_input_tensor(0).shape
        request.infer([np.zeros(shape, np.float32)])
        profile = {
            info.node_name.removesuffix(APART): _precision(info.exec_type)
            for info in request.get_profiling_info()
            if info.node_type in KERNELS and info.status.name == "EXECUTED"
        }
        return by_layer(self._model, profile)


class OpenVinoTensorPart:
    """A compiled graph that ends before decoding."""

    def __init__(self, model: Path, threads: int, hint: str) -> None:
        compiled = engine().compile_model(str(model), "CPU", _settings(threads, hint))
        self._request = compiled.create_infer_request()

    def run(self, images: NDArray[np.float32]) -> object:
        """Raw outputs of one preprocessed image `(1, 3, H, W)`, by port; they stay in the engine's memory."""
        return self._request.infer([images], share_inputs=True, share_outputs=True)


def _settings(threads: int, hint: str) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }


def _precision(kernel: str) -> str:
    """`brgconv_avx512_I8` -> `i8`."""
    found = re.search(r"(i8|u8|bf16|f16|f32)$", kernel.lower())
    return found.group(1).replace("u8", "i8") if found else kernel
