"""Peak memory of serving a model, taken in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from evaluators.targets.registry import target_named

RUNS = 3


def peak_memory_mb(model: Path, target: str, threads: int, hint: str, size: tuple[int, int]) -> float:
    """MB that loading a model into its engine and running it adds to a process, at the peak.

    The engine's own libraries are loaded before and do not count; a worker's process would show what
    earlier candidates and training have left.

    Raises:
        RuntimeError: the process failed; its last line is the message.
    """
    command = [
        sys.executable,
        "-m",
        "evaluators.memory",
        str(model),
        target,
        str(threads),
        hint,
        *map(str, size),
    ]
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"measuring memory: {reason}")
    return float(done.stdout)


def _main(model: str, target: str, threads: str, hint: str, height: str, width: str) -> None:
    engine = target_named(target)
    engine.signature(int(threads))  # loads libraries that a target imports late
    before = _status("VmRSS")
    session = engine.prepare(Path(model), int(threads), hint)
    for _ in range(RUNS):
        session.run(np.zeros((1, 3, int(height), int(width)), np.float32))
    print(_status("VmHWM") - before)


def _status(field: str) -> float:
    """MB of a memory field of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    _main(*sys.argv[1:])
