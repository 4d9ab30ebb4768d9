"""Plain OpenVINO and NNCF, at the study's input size and at smaller ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from evaluators.bench import Bench
from search.peers.models import PeerModel
from search.peers.nncf_peers import quantised_peers
from spaces.inputs import shown_size
from spaces.recipe import Recipe, Resize

REDUCED_LOSS = 1.0
"""AP that a peer's smaller input may cost on select."""


Reduced = dict[str, tuple[Bench, Path]]
"""Bench and float32 file of the base at smaller inputs, by size as it is shown."""


def openvino_peers(base: Path, reduced: Reduced) -> list[PeerModel]:
    """The base in float32 and bfloat16, and in bfloat16 at smaller inputs.

    Args:
        base: the base's float32 file.
        reduced: of `reduced_inputs`.
    """
    peers = [PeerModel("OpenVINO f32", base), PeerModel("OpenVINO bf16", base, hint="bf16")]
    small = [PeerModel(f"OpenVINO bf16, {shown}", file, hint="bf16") for shown, (_, file) in reduced.items()]
    return peers + small


def quantised_at_sizes(bench: Bench, base: Path, directory: Path, reduced: Reduced) -> list[PeerModel]:
    """The base quantised by `nncf.quantize`, at the study's input and at the smallest one.

    `, bf16` says that what is not quantised runs in bfloat16.

    Args:
        bench: of the study, with OpenVINO as its target.
        base: the base's float32 file.
        directory: where other files go.
        reduced: of `reduced_inputs`.

    Raises:
        InputError: NNCF is not installed.
    """
    peers = quantised_peers(bench, base, directory)
    if reduced:
        shown, (small, file) = min(reduced.items(), key=lambda item: _pixels(item[1][0]))
        small_ones = quantised_peers(small, file, file.parent)
        peers += [replace(peer, name=f"{peer.name}, {shown}") for peer in small_ones]
    return peers


def reduced_inputs(bench: Bench, base: Path, directory: Path) -> Reduced:
    """The base at the smaller inputs that the space offers too, where it keeps its AP: as users reduce it.

    Those that lose at most `REDUCED_LOSS` AP on select in bfloat16.
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
    return bench.scored(session)[0]["map"]


def _pixels(bench: Bench) -> int:
    height, width = bench.detector.preprocess.size
    return height * width
