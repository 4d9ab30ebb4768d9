"""The settings that candidates of one study share, as a configuration file says them."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from evaluators.calibration import QuantizationPlan
from evaluators.datasets.base import DataConfig
from evaluators.finetune import FineTunePlan
from evaluators.importance import Importance
from spaces.detectors.base import Postprocess
from spaces.errors import InputError
from spaces.space import Granularity


class SpaceConfig(BaseModel):
    """Which methods are searched, and how finely."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: tuple[str, ...] = ("prune", "quantize")
    granularity: Granularity = "layer"
    bit_widths: tuple[int, ...] = ()


class LatencyConfig(BaseModel):
    """How long a candidate is timed against the base; see `evaluators.latency.measure_pair`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int = Field(default=16, ge=1)
    min_rounds: int = Field(default=32, ge=8)
    max_rounds: int = Field(default=240, ge=8)
    target_spread: float = Field(default=0.02, gt=0.0)
    time_limit_s: float = Field(default=2.2, gt=0.0)

    @model_validator(mode="after")
    def _some_rounds(self) -> LatencyConfig:
        if self.max_rounds < self.min_rounds:
            raise InputError("latency.max_rounds", self.max_rounds, f"is below min_rounds, {self.min_rounds}")
        return self


class BenchConfig(BaseModel):
    """What a worker needs to know to evaluate candidates of a study."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    checkpoint: Path
    size: tuple[int, int] | None = None
    data: DataConfig
    target: str = "openvino"
    threads: int = Field(default=1, ge=1)
    postprocess: Postprocess | None = None
    space: SpaceConfig = SpaceConfig()
    finetune: FineTunePlan = FineTunePlan()
    quantization: QuantizationPlan = QuantizationPlan()
    latency: LatencyConfig = LatencyConfig()
    importance: Importance = "taylor"
    calibration_images: int = Field(default=32, ge=1)
    seed: int = 0
    cache: Path = Path("runs/cache")
