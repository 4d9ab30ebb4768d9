"""What users do today with the same base, each in a few lines over its package."""

from __future__ import annotations

from pathlib import Path

from evaluators.bench import Bench
from search.peers.models import PeerModel
from search.peers.nncf_peers import accuracy_controlled
from search.peers.onnxruntime_peers import onnxruntime_peers
from search.peers.openvino_peers import openvino_peers
from search.peers.pruning_peers import pruned_peers
from spaces.errors import InputError


def peer_models(bench: Bench, base: Path, directory: Path, slow: bool = True) -> list[PeerModel]:
    """All peers of a study; the first one is its base in float32.

    All start from the base's own export, so they have its exact rewrites, its decoding and its
    post-processing, and calibrate on images of fit. Decoding and post-processing are left out of the
    quantisation, which would ruin boxes: the peers get the better of what a careful user would do.

    Args:
        bench: of the study.
        base: the base's float32 file.
        directory: where the peers' files go; those that are there are taken as they are.
        slow: also those that train or search themselves.

    Raises:
        InputError: the target has no peers, or a package of theirs is not installed.
    """
    match bench.config.target:
        case "onnxruntime":
            return onnxruntime_peers(bench, base, directory)
        case "openvino":
            peers = openvino_peers(bench, base, directory)
            if slow:
                peers += accuracy_controlled(bench, base, directory)
                peers += pruned_peers(bench, directory)
            return peers + onnxruntime_peers(bench, base, directory)[1:]
        case other:
            raise InputError("target", other, "only models for openvino and onnxruntime have peers")
