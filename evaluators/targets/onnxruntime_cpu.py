"""ONNX Runtime on this machine's CPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from evaluators.integers import quantized
from evaluators.rewriting import copied
from evaluators.signature import int8_weight_levels, machine_signature
from evaluators.targets.base import Detections, Lowered
from evaluators.targets.onnx_target import OnnxTarget, by_layer
from spaces.capabilities import Capabilities
from spaces.errors import InputError

if TYPE_CHECKING:  # torch is behind it, which a process that only serves need not load
    from evaluators.calibration import LayerRanges

OUTPUTS = ["boxes", "scores", "labels"]
INTEGER = {"QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"}
FLOAT = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}
"""Kernels of convolutions and products."""
OPSET = 21
"""The last whose operators the engine has all. Version 22 of them differs by bfloat16 alone."""


class OnnxRuntime(OnnxTarget):
    """The CPU execution provider, sequential, all graph optimisations. It has no bfloat16 convolution."""

    name = "onnxruntime"
    capabilities = Capabilities(
        bit_widths=(32, 8),
        channel_granule=8,
        depthwise_by_channel=True,
        one_zero_point=True,
        writes_integers=True,
        written_by_channel=True,
    )

    def signature(self, threads: int) -> dict[str, Any]:
        """Machine, engine and version, threads."""
        return machine_signature() | {"engine": f"onnxruntime {ort.__version__}", "threads": threads}

    def lower(
        self, graph: onnx.ModelProto, bits: Mapping[str, int], ranges: Mapping[str, LayerRanges]
    ) -> Lowered:
        """Int8 as Q/DQ around the layer and behind it, which is what the engine fuses."""
        narrow = {layer: ranges[layer] for layer, width in bits.items() if width <= 8}
        if narrow:
            lowered = quantized(graph, narrow, True, int8_weight_levels(), plain_pairs=True)
        else:
            lowered = copied(graph)
        for domain in lowered.opset_import:
            if domain.domain in ("", "ai.onnx"):
                domain.version = min(domain.version, OPSET)
        return Lowered(lowered)

    def prepare(self, model: Path, threads: int, hint: str = "f32") -> OnnxRuntimeSession:
        """Raises InputError when the file is missing or not readable as a model. `hint` changes nothing."""
        if not model.is_file():
            raise InputError("model", str(model), "no such file")
        try:
            return OnnxRuntimeSession(model, threads)
        except Exception as error:  # onnxruntime has a dozen exception types without a common parent
            raise InputError("model", str(model), f"ONNX Runtime cannot load it ({error})") from None

    def _outputs_of(self, model: Path, threads: int, hint: str) -> OnnxRuntimeTensorPart:
        return OnnxRuntimeTensorPart(model, threads)


class OnnxRuntimeSession:
    """A loaded model."""

    def __init__(self, model: Path, threads: int) -> None:
        self._model, self._threads = model, threads
        self._session = _engine(model, _options(threads))

    def run(self, images: NDArray[np.float32]) -> Detections:
        """Whole detector on one preprocessed image `(1, 3, H, W)`."""
        boxes, scores, labels = self._session.run(OUTPUTS, {"images": images})
        return Detections(boxes, scores, labels)

    def kernels(self) -> dict[str, str]:
        """Executed precision (`i8` or `f32`) of each convolution and product."""
        return self._profile

    @cached_property
    def _profile(self) -> dict[str, str]:
        options = _options(self._threads)
        options.enable_profiling = True
        with tempfile.TemporaryDirectory() as directory:
            options.profile_file_prefix = str(Path(directory) / "profile")
            session = _engine(self._model, options)
            session.run(None, {"images": np.zeros(session.get_inputs()[0].shape, np.float32)})
            events = json.loads(Path(session.end_profiling()).read_text())
        precisions = {}
        for event in events:
            kind = event.get("args", {}).get("op_name", "")
            if kind in INTEGER | FLOAT:
                name = event["name"].removesuffix("_kernel_time").removeprefix("fused ")
                precisions[name] = "i8" if kind in INTEGER else "f32"
        return by_layer(self._model, precisions)


class OnnxRuntimeTensorPart:
    """A loaded graph that ends before decoding."""

    def __init__(self, model: Path, threads: int) -> None:
        self._session = _engine(model, _options(threads))

    def run(self, images: NDArray[np.float32]) -> list[Any]:
        """Raw outputs of one preprocessed image `(1, 3, H, W)`."""
        outputs: list[Any] = self._session.run(None, {"images": images})
        return outputs


def _engine(model: Path, options: Any) -> Any:
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def _options(threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Idle threads that spin would take the core of whoever is measured next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
