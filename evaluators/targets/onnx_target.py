"""What the engines of ONNX files share: the file, its layers' names in profiles, its tensor part."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from evaluators.graph import MODEL_FILE, fused_names, layer_nodes, layer_outputs, tensor_part
from evaluators.packing import packed
from evaluators.targets.base import Lowered, TensorPart, Written
from spaces.capabilities import Capabilities
from spaces.errors import InputError

if TYPE_CHECKING:  # torch is behind these, which a process that only serves need not load
    from evaluators.calibration import LayerRanges
    from evaluators.postprocess import WholeDetector

WIDEST_FIRST = ("f32", "bf16", "i8")


class OnnxTarget(ABC):
    """Writes `model.onnx`: the float32 graph, lowered as the engine wants it."""

    model_file = MODEL_FILE

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What the engine runs natively on this machine."""

    @abstractmethod
    def lower(
        self, graph: onnx.ModelProto, bits: Mapping[str, int], ranges: Mapping[str, LayerRanges]
    ) -> Lowered:
        """Write bit-widths into a float32 graph the way this engine runs them.

        Args:
            graph: of the whole detector; left untouched.
            bits: by module name of every layer; 32 changes nothing.
            ranges: calibrated, of every layer at 8 bits or below.
        """

    @abstractmethod
    def _outputs_of(self, model: Path, threads: int, hint: str) -> TensorPart:
        """Load a graph with any outputs."""

    def write(
        self,
        whole: WholeDetector,
        bits: Mapping[str, int],
        ranges: Mapping[str, LayerRanges],
        directory: Path,
    ) -> Written:
        """Export the detector, lower it, and pack weights of few distinct values."""
        from evaluators.export import export_whole
        from evaluators.exported import write_graph

        lowered = self.lower(export_whole(whole), bits, ranges)
        graph, bits_in_file = packed(lowered.graph)
        return Written(write_graph(graph, directory), lowered.hint, bits_in_file)

    def prepare_tensor_part(self, model: Path, threads: int, hint: str = "f32") -> TensorPart:
        """Load the file cut before the first operation that is not of the network."""
        with tempfile.TemporaryDirectory() as folder:
            cut = Path(folder) / MODEL_FILE
            cut.write_bytes(tensor_part(read_graph(model)).SerializeToString())
            return self._outputs_of(cut, threads, hint)


def read_graph(model: Path) -> onnx.ModelProto:
    """Raises InputError when the file is missing or no ONNX model."""
    if not model.is_file():
        raise InputError("model", str(model), "no such file")
    try:
        return onnx.load(model)
    except DecodeError:
        raise InputError("model", str(model), "is no ONNX file") from None


def by_layer(model: Path, profile: Mapping[str, str]) -> dict[str, str]:
    """Executed precisions by layer, out of those by the names in an engine's profile.

    Engines name a kernel after the node that it was made of, or after what it produces, with an ending of
    their own, so the longest such name that begins a kernel's name is taken. Or they name it after the last
    operation that they took into it. A layer that runs several times shows the widest type.
    """
    if model.suffix != ".onnx":
        return dict(profile)
    graph = onnx.load(model)
    nodes = layer_nodes(graph)
    exact = fused_names(graph, nodes)
    nodes |= layer_outputs(graph, nodes)
    longest_first = sorted(nodes, key=len, reverse=True)
    found: dict[str, str] = {}
    for kernel, kind in profile.items():
        node = next((node for node in longest_first if kernel.startswith(node)), None)
        name = exact.get(kernel, kernel if node is None else nodes[node])
        found[name] = min(kind, found.get(name, kind), key=_width)
    return found


def _width(kind: str) -> int:
    return WIDEST_FIRST.index(kind) if kind in WIDEST_FIRST else 0
