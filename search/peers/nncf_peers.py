"""NNCF over a base's own export: `nncf.quantize`, and the one that gives back accuracy."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from evaluators.accuracy import coco_figures, detected
from evaluators.bench import Bench
from evaluators.graph import OUTPUTS, SCOPE
from evaluators.targets.base import Detections
from evaluators.targets.openvino_cpu import engine
from search.peers.models import PeerModel, installed

CALIBRATION_IMAGES = 300
"""NNCF's own default of `subset_size`."""
MAX_DROP = 1.0
"""AP that `quantize_with_accuracy_control` may lose on select."""
AROUND = ("Add", "Multiply", "Concat", "MaxPool", "Interpolate", "Swish", "Sigmoid")
"""Operations that stay as they are where convolutions alone are quantised."""
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "nncf": ("PERFORMANCE", ()),
    "nncf MIXED": ("MIXED", ()),
    "nncf conv only": ("MIXED", AROUND),
}
"""Preset of `nncf.quantize` and what it leaves out, by the peer's name."""


def quantised_peers(bench: Bench, base: Path, directory: Path) -> list[PeerModel]:
    """A base through `nncf.quantize`, with what is left in float32 and in bfloat16.

    Args:
        bench: whose images calibrate.
        base: float32 file.
        directory: where the files go.

    Raises:
        InputError: NNCF is not installed.
    """
    return [peer for name in WAYS for peer in _in_both(name, quantised(bench, base, directory, name))]


def quantised(bench: Bench, base: Path, directory: Path, name: str) -> Path:
    """The file of a base quantised in one of `WAYS`, made where it is not there."""
    nncf, file = _nncf(), directory / f"{name.replace(' ', '_')}.xml"
    preset, around = WAYS[name]
    if not file.exists():
        model = nncf.quantize(
            engine().read_model(base),
            nncf.Dataset(bench.inputs(bench.fit, CALIBRATION_IMAGES)),
            preset=nncf.QuantizationPreset[preset],
            subset_size=CALIBRATION_IMAGES,
            ignored_scope=nncf.IgnoredScope(names=_outside(base), types=list(around), validate=False),
        )
        _save(model, file)
    return file


def accuracy_controlled(bench: Bench, base: Path, directory: Path) -> list[PeerModel]:
    """`nncf.quantize_with_accuracy_control`, which is shown select and may lose `MAX_DROP` AP there."""
    nncf, name = _nncf(), "nncf accuracy control"
    file = directory / f"{name.replace(' ', '_')}.xml"
    if not file.exists():
        model = nncf.quantize_with_accuracy_control(
            engine().read_model(base),
            nncf.Dataset(bench.inputs(bench.fit, CALIBRATION_IMAGES)),
            nncf.Dataset(bench.inputs(bench.select, len(bench.select))),
            lambda compiled, _: (_average_precision(bench, compiled), None),
            max_drop=MAX_DROP,
            subset_size=CALIBRATION_IMAGES,
            preset=nncf.QuantizationPreset.MIXED,
            ignored_scope=nncf.IgnoredScope(names=_outside(base), validate=False),
        )
        _save(model, file)
    return _in_both(name, file)


def _in_both(name: str, file: Path) -> list[PeerModel]:
    """A file with what is left in float32, and in bfloat16."""
    return [PeerModel(name, file), PeerModel(f"{name}, bf16", file, hint="bf16")]


def _average_precision(bench: Bench, compiled: Any) -> float:
    """AP on all of select, 0..100, of what NNCF has made so far."""

    def run(inputs: NDArray[np.float32]) -> Detections:
        found = compiled([inputs])
        return Detections(*(found[name].copy() for name in OUTPUTS))

    split = bench.splits["select"]
    return coco_figures(split, detected(run, split, bench.select, bench.detector.preprocess))["map"]


def _outside(base: Path) -> list[str]:
    """Operations of decoding and suppression."""
    return [
        op.get_friendly_name()
        for op in engine().read_model(base).get_ordered_ops()
        if op.get_type_name() not in ("Constant", "Parameter", "Result")
        and not op.get_friendly_name().startswith(SCOPE)
    ]


def _save(model: ov.Model, file: Path) -> None:
    """Whole or not at all: a file that is there is taken as it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"draft_{file.name}")
    ov.save_model(model, draft, compress_to_fp16=False)
    draft.with_suffix(".bin").replace(file.with_suffix(".bin"))
    draft.replace(file)


def _nncf() -> Any:
    nncf = installed("nncf", "nncf")
    nncf.set_log_level(logging.ERROR)
    return nncf
