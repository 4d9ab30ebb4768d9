"""Sony's Model Compression Toolkit, where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from evaluators.bench import Bench
from evaluators.export import export_whole
from evaluators.exported import write_graph
from evaluators.postprocess import WholeDetector
from search.peers.models import PeerModel, installed

CALIBRATION_IMAGES = 100


def mct_peers(bench: Bench, directory: Path) -> list[PeerModel]:
    """The base through `pytorch_post_training_quantization` with its default target, as Q/DQ in OpenVINO.

    Its own exporter knows no decoding and needs onnxscript; the network that it returns is exported as ours
    are. What it quantises to 16 bits stays in float32, as in its exporter.

    Args:
        bench: of the study, with OpenVINO as its target.
        directory: where the file goes.

    Raises:
        InputError: it is not installed.
    """
    toolkit = installed("model_compression_toolkit", "model-compression-toolkit")
    folder = directory / "mct"
    file = folder / bench.target.model_file
    if not file.exists():
        inputs = bench.inputs(bench.fit, CALIBRATION_IMAGES)

        def images() -> Iterator[list[Any]]:
            yield from ([image] for image in inputs)

        network, _ = toolkit.ptq.pytorch_post_training_quantization(
            bench.detector.simplified(bench.base), images
        )
        network = _in_bytes(network.cpu().eval())
        whole = WholeDetector(network, bench.detector, bench.postprocess, bench.categories).eval()
        write_graph(export_whole(whole), folder)
    return [PeerModel("Sony MCT", file), PeerModel("Sony MCT, bf16", file, hint="bf16")]


def _in_bytes(network: nn.Module) -> nn.Module:
    """Without rounding of activations to more than 8 bits, which ONNX has no operator for."""
    for name, module in list(network.named_modules()):
        quantizer = getattr(module, "activation_holder_quantizer", None)
        if quantizer is not None and quantizer.num_bits > 8:
            network.set_submodule(name, nn.Identity())
    return network
