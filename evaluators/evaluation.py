"""What is known about a candidate: measurements, or the stage and the reason of its failure."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

RESULT_VERSION = 11
"""Goes up whenever figures of older versions are no longer comparable."""


class Measurement(BaseModel):
    """A figure with its unit and, where it was sampled, its interval and raw samples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    samples: tuple[float, ...] = ()


class Failure(BaseModel):
    """Why a candidate could not be evaluated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    reason: str


class Evaluation(BaseModel):
    """Everything that was found out about one recipe.

    `metrics` holds, by name: map (COCO AP@[.50:.95], 0..100), map_50 and the other ten COCO figures,
    latency_ratio (candidate / base, lower is better), latency_ms (ratio x the study's reference),
    tensor_ms, size_mb (model file on disk), params, macs, peak_memory_mb, train_step_ms.
    """

    model_config = ConfigDict(extra="forbid")

    recipe_key: str
    status: Literal["ok", "failed"]
    metrics: dict[str, Measurement] = Field(default_factory=dict)
    failure: Failure | None = None
    split: str = ""
    artifact: str | None = None
    environment: dict[str, Any] = Field(default_factory=dict)
    details: dict[str, Any] = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict)
    version: int = RESULT_VERSION
