"""How long a user waits from the command to the first job of a worker."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from spaces.errors import InputError

STARTED = "worker "
"""Begins the line that `search.progress` prints when a worker has taken its first job."""
PATIENCE_S = 300.0


def seconds_to_first_job(
    config: Path, workers: int, program: str = "search.cli:main"
) -> list[tuple[str, float]]:
    """Run `paredown search CONFIG` in a process of its own until a worker has a job, then stop it.

    Data that the configuration has to make first (letterboxed images, the embedded digits) are made by the
    first such command; call this twice to tell the two apart.

    Returns:
        Lines that the command printed, with the seconds from its start; the last one is of the first job.

    Raises:
        InputError: the command ended, or nothing happened for minutes.
    """
    with tempfile.TemporaryDirectory(prefix="paredown-") as folder:
        module, function = program.split(":")
        called = f"import sys; from {module} import {function}; sys.exit({function}())"
        command = [sys.executable, "-u", "-c", called]
        command += ["search", str(config), "--workers", str(workers), "--trials", "1"]
        command += ["--storage", f"sqlite:///{folder}/first.db", "--study", "first-job"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        began = time.monotonic()
        running = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        try:
            return _lines_until(running, began)
        finally:
            running.terminate()  # a search ends its workers, as at Ctrl-C
            try:
                running.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                running.kill()
                running.communicate()


def _lines_until(running: subprocess.Popen[str], began: float) -> list[tuple[str, float]]:
    lines: list[tuple[str, float]] = []
    assert running.stdout is not None
    for line in running.stdout:
        lines.append((line.rstrip(), time.monotonic() - began))
        if line.startswith(STARTED):
            return lines
        if time.monotonic() - began > PATIENCE_S:
            break
    shown = lines[-1][0] if lines else "nothing"
    raise InputError("first job", None, f"the command started no job; the last it said was: {shown}")
