"""ONNX Runtime's own static quantisation, as its documentation says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from evaluators.bench import Bench
from evaluators.graph import INPUT, SCOPE
from search.peers.models import PeerModel
from search.peers.reduced import Reduced, with_smallest

CALIBRATION_IMAGES = 100


def onnxruntime_peers(bench: Bench, base: Path, directory: Path, reduced: Reduced) -> list[PeerModel]:
    """The base in float32, then with Q/DQ around all of the network, and around its convolutions alone.

    Preprocessed first, scales by channel, minimum and maximum of the activations: what the page "Quantize
    ONNX models" recommends for CPUs and convolutions. Float32 of all that is reduced, Q/DQ of the smallest.

    Args:
        bench: of the study.
        base: the base's float32 file.
        directory: where the quantised files go.
        reduced: of `reduced_inputs`.
    """
    plain = PeerModel("ONNX Runtime f32", base, "onnxruntime")
    files = {f"{plain.name}, {shown}": file for shown, (_, file) in reduced.items()}
    small = [replace(plain, name=name, model=file) for name, file in files.items()]
    return [plain, *with_smallest(_quantised, bench, base, directory, reduced), *small]


def _quantised(bench: Bench, base: Path, directory: Path) -> list[PeerModel]:
    peers = []
    for name, kinds in (("ONNX Runtime QDQ", None), ("ONNX Runtime QDQ, conv only", ["Conv"])):
        file = directory / f"{name.replace(' ', '_').replace(',', '')}.onnx"
        if not file.exists():
            directory.mkdir(parents=True, exist_ok=True)
            with bench.slot.computing():
                _quantise(bench, base, file, kinds)
        peers.append(PeerModel(name, file, "onnxruntime"))
    return peers


def _quantise(bench: Bench, base: Path, file: Path, kinds: list[str] | None) -> None:
    prepared, draft = file.with_suffix(".prepared"), file.with_suffix(".draft")
    # Symbolic shape inference fails on decoding, and is for transformers.
    quant_pre_process(base, prepared, skip_symbolic_shape=True)
    outside = [node.name for node in onnx.load(prepared).graph.node if not node.name.startswith(SCOPE)]
    quantize_static(
        prepared,
        draft,
        _Images(bench.inputs(bench.fit, CALIBRATION_IMAGES)),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,  # for x86; and the other makes files of YOLOX that do not load
        op_types_to_quantize=kinds,
        nodes_to_exclude=outside,
    )
    prepared.unlink()
    draft.rename(file)


class _Images(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: list[NDArray[np.float32]]) -> None:
        self._images: Iterator[NDArray[np.float32]] = iter(images)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        image = next(self._images, None)
        return None if image is None else {INPUT: image}
