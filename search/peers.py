"""What users do today with the same base: plain OpenVINO and NNCF, each in a few lines over its package."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import openvino as ov

from evaluators.accuracy import score_session
from evaluators.bench import Bench
from evaluators.targets.openvino_cpu import engine
from spaces.errors import InputError
from spaces.inputs import shown_size
from spaces.recipe import Recipe, Resize

CALIBRATION_IMAGES = 300
"""NNCF's own default of `subset_size`."""
REDUCED_LOSS = 1.0
"""AP that a peer's smaller input may cost on select."""


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
    says that what is not quantised runs in bfloat16. Where the search may choose a smaller input, so may the
    peers, on the same images: bfloat16 at every size that loses no more than `REDUCED_LOSS`, NNCF at the
    smallest of these.

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
    peers += _quantised(bench, base, directory)
    reduced = _reduced(bench, base, directory)
    peers += [PeerModel(f"OpenVINO bf16, {shown}", file, "bf16") for shown, (_, file) in reduced.items()]
    if reduced:
        shown, (small, file) = min(reduced.items(), key=lambda item: _pixels(item[1][0]))
        peers += [
            replace(peer, name=f"{peer.name}, {shown}") for peer in _quantised(small, file, file.parent)
        ]
    return peers


def _quantised(bench: Bench, base: Path, directory: Path) -> list[PeerModel]:
    """A base through every way of NNCF, with what is left in float32 and in bfloat16."""
    peers = []
    for name, make in _quantisers().items():
        file = directory / f"{name.replace(' ', '_')}.xml"
        if not file.exists():
            directory.mkdir(parents=True, exist_ok=True)
            ov.save_model(make(bench, base), file, compress_to_fp16=False)
        peers += [PeerModel(name, file, "f32"), PeerModel(f"{name}, bf16", file, "bf16")]
    return peers


def _reduced(bench: Bench, base: Path, directory: Path) -> dict[str, tuple[Bench, Path]]:
    """The base at the smaller inputs that the space offers too, where it keeps its AP: as users reduce it.

    Returns:
        Bench and float32 file by size, of those that lose at most `REDUCED_LOSS` AP on select in bfloat16.
    """
    if bench.sites.input is None:
        return {}
    at_full = _score(bench, base)
    found = {}
    for height, width in bench.sites.input.smaller:
        recipe = Recipe(detector=bench.detector.name, choices=(Resize(height=height, width=width),))
        small, shown = bench.at(recipe), shown_size((height, width))
        folder = directory / shown
        file = folder / bench.target.model_file
        if not file.exists():
            small.export(small.base, {}, recipe, folder)
        if at_full - _score(small, file) <= REDUCED_LOSS:
            found[shown] = small, file
    return found


def _score(bench: Bench, file: Path) -> float:
    """AP on select in bfloat16, 0..100."""
    session = bench.target.prepare(file, bench.config.threads, "bf16")
    return score_session(session, bench.splits["select"], bench.select, bench.detector.preprocess)[0]["map"]


def _pixels(bench: Bench) -> int:
    height, width = bench.detector.preprocess.size
    return height * width


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
