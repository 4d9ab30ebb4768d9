"""Plain OpenVINO and NNCF, at the study's input size and at smaller ones."""

from __future__ import annotations

from pathlib import Path

from evaluators.bench import Bench
from search.peers.models import PeerModel
from search.peers.nncf_peers import quantised_peers
from search.peers.reduced import Reduced, with_smallest


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
    return with_smallest(quantised_peers, bench, base, directory, reduced)
