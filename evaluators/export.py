"""From a network to an ONNX graph with decoding and suppression inside, ready for an engine."""

from __future__ import annotations

import io
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from evaluators.graph import INPUT, OUTPUTS, PREFIX, TURNED, layer_of, scope_of
from evaluators.postprocess import WholeDetector
from evaluators.rewriting import constant, constants, without_unread
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
    return _with_own_weights(graph, whole.network)


def _with_own_weights(graph: onnx.ModelProto, network: nn.Module) -> onnx.ModelProto:
    """A graph, changed in place, in which every layer reads a weight under its own name.

    Of weights that are alike the exporter keeps one: each layer gets its own, for they may be given different
    bit-widths. Of a linear layer without a bias, or over more than one position (`(N, L, C)`), it keeps a
    product, and the weight as a constant `(inputs, outputs)` that has no name. Such a layer is found by the
    values, which no name can get wrong; among layers with the same values by the scope of the node.
    """
    layers: dict[bytes, list[str]] = defaultdict(list)
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            layers[_contents(module.weight.detach().cpu().numpy().T)].append(name)
    stored, own = constants(graph), {tensor.name for tensor in graph.graph.initializer}
    made: set[str] = set()
    for node in graph.graph.node:
        name, layer = node.input[1] if len(node.input) > 1 else "", layer_of(node)
        if name not in stored:
            continue
        if layer is None and node.op_type == "MatMul":
            alike = layers.get(_contents(numpy_helper.to_array(stored[name])), [])
            scope = scope_of(node.name)
            scopes = (scope, scope.rpartition("_")[0])
            found = [one for one in alike if f".{one}".endswith(tuple(f".{s}" for s in scopes if s))] or alike
            name = f"{PREFIX}{found[0]}{TURNED}" if found else name
        elif layer is None or name in own:
            continue
        if name != node.input[1] or name not in own:
            constant(graph, name, numpy_helper.to_array(stored[node.input[1]]))
            node.input[1] = name
            made.add(name)
    for node in [one for one in graph.graph.node if one.op_type == "Identity" and one.output[0] in made]:
        graph.graph.node.remove(node)
    return without_unread(graph) if made else graph


def _contents(array: np.ndarray) -> bytes:
    """What two arrays share that are the same."""
    return repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without torch's fused attention, which the exporter does not know."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
