"""Targets by name. A new one is one file and one line here, and the contract test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evaluators.targets.analytic import PREFIX, Analytic
from evaluators.targets.base import Target
from evaluators.targets.onnxruntime_cpu import OnnxRuntime
from evaluators.targets.openvino_cpu import OpenVino
from evaluators.targets.torch_engine import TorchEngine
from spaces.errors import InputError

TARGETS: dict[str, Target] = {
    "openvino": OpenVino(),
    "onnxruntime": OnnxRuntime(),
    "torch": TorchEngine("torch", compiled=False),
    "torch-compiled": TorchEngine("torch-compiled", compiled=True),
    "torch-cuda": TorchEngine("torch-cuda", compiled=True, device="cuda"),
}


def target_named(name: str) -> Target:
    """A target by its name in `TARGETS`, or described by a file: `analytic:FILE`.

    Raises:
        InputError: an unknown name, or a description that cannot be used.
    """
    if name.startswith(PREFIX):
        return Analytic(Path(name.removeprefix(PREFIX)).expanduser())
    if name not in TARGETS:
        raise InputError("target", name, f"choose one of {', '.join(TARGETS)}, or {PREFIX}FILE")
    return TARGETS[name]


def signature_here(name: str, threads: int) -> dict[str, Any]:
    """What latencies in a target depend on, on this machine.

    Raises:
        InputError: as `target_named`.
    """
    return target_named(name).signature(threads)
