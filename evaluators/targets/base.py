"""The Target protocol: an engine on this machine that serves exported models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import onnx
from numpy.typing import NDArray

from spaces.capabilities import Capabilities

if TYPE_CHECKING:  # torch is behind it, which a process that only serves need not load
    from evaluators.calibration import LayerRanges


@dataclass(frozen=True)
class Detections:
    """Final boxes of one image.

    Attributes:
        boxes: `(N, 4)` float32 xyxy, pixels of the network's input.
        scores: `(N,)` float32 in 0..1.
        labels: `(N,)` int64, category ids of the data set.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Lowered:
    """A graph as an engine wants it, and the precision hint that the engine needs with it."""

    graph: onnx.ModelProto
    hint: str = "f32"


@runtime_checkable
class Session(Protocol):
    """A model file loaded into an engine."""

    def run(self, images: NDArray[np.float32]) -> Detections:
        """Whole detector: `(1, 3, H, W)` float32, preprocessed, to final boxes."""
        ...

    def kernels(self) -> dict[str, str]:
        """Executed precision by layer name (`i8`, `bf16`, `f32`), read from the engine's own profile."""
        ...


@runtime_checkable
class Target(Protocol):
    """An engine with its settings. Stateless; sessions hold what was loaded."""

    name: str

    @property
    def capabilities(self) -> Capabilities:
        """What this engine runs natively on this machine."""
        ...

    def signature(self, threads: int) -> dict[str, Any]:
        """What latencies depend on: engine and version, CPU model, ISA, threads, precision hint."""
        ...

    def lower(
        self, graph: onnx.ModelProto, bits: Mapping[str, int], ranges: Mapping[str, LayerRanges]
    ) -> Lowered:
        """Write bit-widths into a float32 graph the way this engine runs them.

        Args:
            graph: of the whole detector; left untouched.
            bits: by module name of every layer; 32 changes nothing.
            ranges: calibrated, of every layer at 8 bits or below.
        """
        ...

    def prepare(self, model: Path, threads: int, hint: str = "f32") -> Session:
        """Load an exported model file; `hint` is the precision that its `model.json` asks the engine for.

        Raises:
            InputError: the file is missing or no model that this engine reads.
        """
        ...
