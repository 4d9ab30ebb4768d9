"""What users do today with the same base: plain OpenVINO and NNCF, each in a few lines over its package."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import openvino as ov

from evaluators.bench import Bench
from evaluators.targets.openvino_cpu import engine
from spaces.errors import InputError

CALIBRATION_IMAGES = 300
"""NNCF's own default of `subset_size`."""


@dataclass(frozen=True)
class PeerModel:
    """A model file of a peer and the precision hint that it is run with."""

    name: str
    model: Path
    hint: str


def openvino_peers(bench: Bench, base: Path, directory: Path) -> list[PeerModel]:
    """The base in float32 and bfloat16, and quantised by `nncf.quantize` as its documentation says.

    All start from the base's own export, so they have its exact rewrites, its decoding and its
    post-processing, and calibrate on images of fit. Decoding and post-processing are left out of the
    quantisation, which would ruin boxes: the peers get the better of what a careful user would do. `, bf16`
    says that what is not quantised runs in bfloat16.

    Args:
        bench: of the study, with OpenVINO as its target.
        base: the base's float32 file.
        directory: where the quantised files go.

    Raises:
        InputError: NNCF is not installed, or the target is another engine.
    """
    if bench.config.target != "openvino":
        raise InputError("target", bench.config.target, "these peers run in OpenVINO alone")
    peers = [PeerModel("OpenVINO f32", base, "f32"), PeerModel("OpenVINO bf16", base, "bf16")]
    for name, make in _quantisers().items():
        file = directory / f"{name.replace(' ', '_')}.xml"
        if not file.exists():
            directory.mkdir(parents=True, exist_ok=True)
            ov.save_model(make(bench, base), file, compress_to_fp16=False)
        peers += [PeerModel(name, file, "f32"), PeerModel(f"{name}, bf16", file, "bf16")]
    return peers


def _quantisers() -> dict[str, Callable[[Bench, Path], ov.Model]]:
    try:
        import nncf
    except ImportError:
        raise InputError("nncf", None, "is not installed; pip install 'paredown[test]'") from None
    nncf.set_log_level(logging.ERROR)

    def quantised(
        preset: nncf.QuantizationPreset, convolutions_only: bool
    ) -> Callable[[Bench, Path], ov.Model]:
        def make(bench: Bench, base: Path) -> ov.Model:
            model = engine().read_model(base)
            outside = [
                op.get_friendly_name()
                for op in model.get_ordered_ops()
                if op.get_type_name() not in ("Constant", "Parameter", "Result")
                and not op.get_friendly_name().startswith("/network/")
            ]
            skipped = ["Add", "Multiply", "Concat", "MaxPool", "Interpolate", "Swish", "Sigmoid"]
            ignored = nncf.IgnoredScope(
                names=outside,
                types=skipped if convolutions_only else [],
                validate=False,
            )
            images = nncf.Dataset(bench.inputs(bench.fit, CALIBRATION_IMAGES))
            return nncf.quantize(
                model, images, preset=preset, subset_size=CALIBRATION_IMAGES, ignored_scope=ignored
            )

        return make

    presets = nncf.QuantizationPreset
    return {
        "nncf": quantised(presets.PERFORMANCE, False),
        "nncf MIXED": quantised(presets.MIXED, False),
        "nncf conv only": quantised(presets.MIXED, True),
    }
