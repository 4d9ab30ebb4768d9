"""From a network to an ONNX graph with decoding and suppression inside, ready for an engine."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnx
import torch
from torch import nn

from evaluators.graph import INPUT, OUTPUTS
from evaluators.postprocess import WholeDetector
from spaces.detectors.base import Category, Detector, Postprocess

TRACE_OPSET = 17
"""What the TorchScript exporter writes best; the dynamo exporter fails on detectors with suppression."""
OPSET = 22
"""The first one with bfloat16 convolutions."""


def export_graph(
    network: nn.Module, detector: Detector, postprocess: Postprocess, categories: Sequence[Category]
) -> onnx.ModelProto:
    """The whole detector of a network as a float32 graph; see `export_whole`.

    Args:
        network: of that detector, pruned or not; simplified here, left untouched.
        detector: decodes its outputs.
        postprocess: thresholds and limits, written into the graph.
        categories: of the data set, in the order of the network's classes.
    """
    return export_whole(WholeDetector(detector.simplified(network), detector, postprocess, categories).eval())


def export_whole(whole: WholeDetector) -> onnx.ModelProto:
    """A detector in evaluation mode as a float32 graph.

    Takes `images` float32 `(1, 3, H, W)`, preprocessed; returns `boxes` `(N, 4)` xyxy in input pixels,
    `scores` `(N,)` in 0..1, `labels` `(N,)` int64 category ids, best score first.
    """
    images = torch.zeros(1, 3, *whole.detector.preprocess.size)
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad(), _plain_attention():
        warnings.simplefilter("ignore")  # the exporter's own deprecation, and shapes that are constant here
        torch.onnx.export(
            whole,
            (images,),
            buffer,  # type: ignore[arg-type]  # takes streams, its annotation does not say so
            dynamo=False,
            opset_version=TRACE_OPSET,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            dynamic_axes={name: {0: "detections"} for name in OUTPUTS},
        )
    graph = onnx.version_converter.convert_version(onnx.load_from_string(buffer.getvalue()), OPSET)
    graph.producer_name = "paredown"
    return graph


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without torch's fused attention, which the exporter does not know."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
