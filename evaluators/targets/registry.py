"""Targets by name. A new one is one file and one line here, and the contract test."""

from __future__ import annotations

from evaluators.targets.base import Target
from evaluators.targets.onnxruntime_cpu import OnnxRuntime
from evaluators.targets.openvino_cpu import OpenVino
from spaces.errors import InputError

TARGETS: dict[str, Target] = {
    "openvino": OpenVino(),
    "onnxruntime": OnnxRuntime(),
}


def target_named(name: str) -> Target:
    """Raises InputError for an unknown name, listing the known ones."""
    if name not in TARGETS:
        raise InputError("target", name, f"choose one of {', '.join(TARGETS)}")
    return TARGETS[name]
