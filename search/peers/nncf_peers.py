"""NNCF over a base's own export: `nncf.quantize`, and the one that gives back accuracy."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import openvino as ov

from evaluators.accuracy import coco_figures, to_original
from evaluators.bench import Bench
from evaluators.graph import SCOPE
from evaluators.targets.base import Detections
from evaluators.targets.openvino_cpu import engine
from search.peers.models import PeerModel
from spaces.errors import InputError

CALIBRATION_IMAGES = 300
"""NNCF's own default of `subset_size`."""
MAX_DROP = 1.0
"""AP that `quantize_with_accuracy_control` may lose on select."""
AROUND = ("Add", "Multiply", "Concat", "MaxPool", "Interpolate", "Swish", "Sigmoid")
"""Operations that stay as they are where convolutions alone are quantised."""


def quantised_peers(bench: Bench, base: Path, directory: Path) -> list[PeerModel]:
    """A base through `nncf.quantize`, with what is left in float32 and in bfloat16.

    Args:
        bench: whose images calibrate.
        base: float32 file.
        directory: where the files go.

    Raises:
        InputError: NNCF is not installed.
    """
    presets = _nncf().QuantizationPreset
    peers = []
    for name, preset, around in (
        ("nncf", presets.PERFORMANCE, ()),
        ("nncf MIXED", presets.MIXED, ()),
        ("nncf conv only", presets.MIXED, AROUND),
    ):
        file = directory / f"{name.replace(' ', '_')}.xml"
        if not file.exists():
            _save(_quantised(bench, base, preset, around), file)
        peers += [PeerModel(name, file), PeerModel(f"{name}, bf16", file, hint="bf16")]
    return peers


def convolutions_quantised(bench: Bench, base: Path, directory: Path) -> Path:
    """The file of "nncf conv only" of a base."""
    (file,) = {p.model for p in quantised_peers(bench, base, directory) if p.name == "nncf conv only"}
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
            lambda compiled, images: (_average_precision(bench, compiled, images), None),
            max_drop=MAX_DROP,
            subset_size=CALIBRATION_IMAGES,
            preset=nncf.QuantizationPreset.MIXED,
            ignored_scope=nncf.IgnoredScope(names=_outside(base), validate=False),
        )
        _save(model, file)
    return [PeerModel(name, file), PeerModel(f"{name}, bf16", file, hint="bf16")]


def _average_precision(bench: Bench, compiled: Any, images: Iterable[Any]) -> float:
    """AP on select, 0..100, of what NNCF has made so far."""
    found = {}
    for image, scale, inputs in zip(bench.splits["select"].images, bench.select.scales, images, strict=False):
        boxes, scores, labels = (compiled([inputs])[key].copy() for key in ("boxes", "scores", "labels"))
        found[image.id] = to_original(Detections(boxes, scores, labels), scale)
    return coco_figures(bench.splits["select"], found)["map"]


def _quantised(bench: Bench, base: Path, preset: Any, around: Iterable[str]) -> ov.Model:
    nncf = _nncf()
    return nncf.quantize(
        engine().read_model(base),
        nncf.Dataset(bench.inputs(bench.fit, CALIBRATION_IMAGES)),
        preset=preset,
        subset_size=CALIBRATION_IMAGES,
        ignored_scope=nncf.IgnoredScope(names=_outside(base), types=list(around), validate=False),
    )


def _outside(base: Path) -> list[str]:
    """Operations of decoding and suppression."""
    return [
        op.get_friendly_name()
        for op in engine().read_model(base).get_ordered_ops()
        if op.get_type_name() not in ("Constant", "Parameter", "Result")
        and not op.get_friendly_name().startswith(SCOPE)
    ]


def _save(model: ov.Model, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    ov.save_model(model, file, compress_to_fp16=False)


def _nncf() -> Any:
    try:
        import nncf
    except ImportError:
        raise InputError("nncf", None, "is not installed; pip install 'paredown[test]'") from None
    nncf.set_log_level(logging.ERROR)
    return nncf
