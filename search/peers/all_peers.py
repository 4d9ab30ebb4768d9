"""What users do today with the same base, each in a few lines over its package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from evaluators.bench import Bench
from evaluators.targets.base import Session
from search.comparison import bench_of
from search.peers.mct_peers import mct_peers
from search.peers.models import PeerModel
from search.peers.nncf_peers import accuracy_controlled
from search.peers.olive_peers import olive_peers
from search.peers.onnxruntime_peers import onnxruntime_peers
from search.peers.openvino_peers import openvino_peers, quantised_at_sizes
from search.peers.pruning_peers import pruned_peers
from search.peers.reduced import reduced_inputs
from spaces.errors import InputError


@dataclass
class Peers:
    """Peers that run, the first of which is the base in float32, and those that do not.

    Attributes:
        models: by name: loaded, and its file.
        left_out: why, by name of a peer or of a family of them. Other people's packages have their limits.
    """

    models: dict[str, tuple[Session, Path]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def peers_of(
    bench: Bench, base: Path, directory: Path, slow: bool = True, say: Callable[[str], None] = print
) -> Peers:
    """All peers of a study.

    All start from the base's own export, so they have its exact rewrites, its decoding and its
    post-processing, and calibrate on images of fit. Decoding and post-processing are left out of the
    quantisation, which would ruin boxes: the peers get the better of what a careful user would do.

    Args:
        bench: of the study.
        base: the base's float32 file.
        directory: where the peers' files go; those that are there are taken as they are.
        slow: also those that train or search themselves.
        say: takes a line at a time.

    Raises:
        InputError: the target has no peers, or the base does not run, which all are compared with.
    """
    peers = Peers()
    for family, make in _families(bench, base, directory, slow).items():
        say(f"making peers: {family}")
        for peer in _those_of(family, make, peers.left_out):
            try:
                session = peer.session(bench.config.threads)
                session.run(bench_of(bench, peer.model).timing_inputs[0])
            except Exception as error:
                peers.left_out[peer.name] = _reason(error)
            else:
                peers.models[peer.name] = session, peer.model
    first = next(iter(peers.models.values()), None)
    if first is None or first[1] != base:
        raise InputError("model", str(base), f"does not run: {'; '.join(peers.left_out.values())}")
    for name, reason in peers.left_out.items():
        say(f"left out: {name}: {reason}")
    return peers


def _families(
    bench: Bench, base: Path, directory: Path, slow: bool
) -> dict[str, Callable[[], list[PeerModel]]]:
    hint = "bf16" if bench.config.target == "openvino" else "f32"
    reduced = cache(partial(reduced_inputs, bench, base, directory, hint))
    match bench.config.target:
        case "onnxruntime":
            return {
                "smaller inputs, onnxruntime.quantization": lambda: onnxruntime_peers(
                    bench, base, directory, reduced()
                ),
                "Olive": lambda: olive_peers(bench, base, directory, reduced()),
            }
        case "openvino":
            patient: dict[str, Callable[[], list[PeerModel]]] = {
                "nncf.quantize_with_accuracy_control": partial(accuracy_controlled, bench, base, directory),
                "torch-pruning, trained as candidates are": partial(pruned_peers, bench, directory),
            }
            return {
                "precisions, smaller inputs": lambda: openvino_peers(base, reduced()),
                "nncf.quantize": lambda: quantised_at_sizes(bench, base, directory, reduced()),
                **(patient if slow else {}),
                "onnxruntime.quantization": lambda: onnxruntime_peers(bench, base, directory, reduced())[1:],
                "Olive": lambda: olive_peers(bench, base, directory, reduced()),
                "Sony MCT": partial(mct_peers, bench, directory),
            }
        case other:
            raise InputError("target", other, "only models for openvino and onnxruntime have peers")


def _those_of(family: str, make: Callable[[], list[PeerModel]], left_out: dict[str, str]) -> list[PeerModel]:
    try:
        return make()
    except Exception as error:
        left_out[family] = _reason(error)
        return []


def _reason(error: Exception) -> str:
    """In one line: other people's packages have their own errors."""
    if isinstance(error, InputError):
        return error.remedy
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
