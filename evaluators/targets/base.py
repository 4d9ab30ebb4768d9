"""The Target protocol: an engine on this machine that serves exported models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import onnx
from numpy.typing import NDArray

from spaces.capabilities import Capabilities

if TYPE_CHECKING:  # torch is behind these, which a process that only serves need not load
    from evaluators.calibration import LayerRanges
    from evaluators.postprocess import WholeDetector
    from evaluators.targets.roofline import Roofline


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


@dataclass(frozen=True)
class Written:
    """A deployable file, and the precision hint that its engine needs with it.

    Attributes:
        model: the file.
        hint: for the engine.
        packed: bits that each weight takes in the file, by layer, where they are packed.
    """

    model: Path
    hint: str = "f32"
    packed: Mapping[str, int] = field(default_factory=dict)


class TensorPart(Protocol):
    """A model without its decoding and suppression, loaded into an engine."""

    def run(self, images: NDArray[np.float32]) -> object:
        """`(1, 3, H, W)` float32, preprocessed, to raw outputs, the engine's arrays in a row or by key."""
        ...


@runtime_checkable
class Session(Protocol):
    """A model file loaded into an engine."""

    def run(self, images: NDArray[np.float32]) -> Detections:
        """Whole detector: `(1, 3, H, W)` float32, preprocessed, to final boxes."""
        ...

    def kernels(self) -> dict[str, str]:
        """Executed precision (`i8`, `bf16`, `f32`) by layer, read from the engine's own profile.

        Layers go by their module names; convolutions and products that are of no layer keep the name
        that the profile gives them. A layer that the engine has removed is missing.
        """
        ...


@runtime_checkable
class Predicting(Protocol):
    """A session whose latency is computed from a description of the hardware, not measured."""

    @property
    def predicted_ms(self) -> float:
        """Latency of one image, milliseconds."""
        ...

    @property
    def roofline(self) -> Roofline:
        """What the model reaches of what the hardware could do."""
        ...


@runtime_checkable
class Target(Protocol):
    """An engine with its settings. Stateless; sessions hold what was loaded.

    Attributes:
        name: by which `registry.target_named` finds it.
        model_file: name of the deployable file, one of `evaluators.exported.MODEL_FILES`.
    """

    name: str
    model_file: str

    @property
    def capabilities(self) -> Capabilities:
        """What this engine runs natively on this machine.

        Raises:
            InputError: this machine lacks what the engine needs.
        """
        ...

    def signature(self, threads: int) -> dict[str, Any]:
        """What latencies depend on: engine and version, CPU model, ISA, threads, precision hint."""
        ...

    def write(
        self,
        whole: WholeDetector,
        bits: Mapping[str, int],
        ranges: Mapping[str, LayerRanges],
        directory: Path,
    ) -> Written:
        """Write the deployable file of a detector, whole or not at all.

        Args:
            whole: simplified and in evaluation mode; left untouched.
            bits: by module name of every layer; 32 changes nothing.
            ranges: calibrated, of every layer at 8 bits or below.
            directory: made where it is not there; the file is called `model_file`.
        """
        ...

    def prepare(self, model: Path, threads: int, hint: str = "f32") -> Session:
        """Load an exported model file; `hint` is the precision that its `model.json` asks the engine for.

        Raises:
            InputError: the file is missing or no model that this engine reads.
        """
        ...

    def prepare_tensor_part(self, model: Path, threads: int, hint: str = "f32") -> TensorPart:
        """Load the part of an exported model before decoding and suppression, to time it by itself.

        Raises:
            InputError: as `prepare`.
        """
        ...
