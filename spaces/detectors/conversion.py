"""Weights files that hold more than tensors, made into safetensors once, by a process of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spaces.detectors import unpickling
from spaces.detectors.weights import MixedFileError, read_weights, write_tensors
from spaces.errors import InputError


def convert(file: Path, output: Path, trust: bool = False) -> int:
    """Write the tensors of a PyTorch file as safetensors, under the names that they have in it.

    A file that holds nothing but tensors is read as such. Anything else is a pickle, which is a program: it
    is run only where `trust` says so, in a process of its own that starts in an empty folder, sees none of
    this process's environment and hands back tensors. That keeps accidents away from this process; it is no
    cage. What the file does, it does with the user's rights.

    Args:
        file: `.pt` or `.pth`, left as it is.
        output: `.safetensors` to write, whole or not at all.
        trust: run what is in the file.

    Returns:
        The number of tensors written.

    Raises:
        InputError: the file is missing, damaged or not to be trusted, or something is at `output` already.
    """
    if output.suffix != ".safetensors":
        raise InputError("--output", str(output), "must end in .safetensors")
    if output.exists():
        raise InputError("--output", str(output), "is there already; name another file")
    try:
        tensors = read_weights(file)
    except MixedFileError:
        if not trust:
            raise InputError(
                "FILE",
                str(file),
                "is a pickle that holds more than tensors, and reading it runs whatever its author put in; "
                "--trust does that once, for files whose origin you know",
            ) from None
        tensors = _unpickled(file)
    write_tensors({name: value.contiguous() for name, value in tensors.items()}, output)
    return len(tensors)


def _unpickled(file: Path) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory(prefix="paredown-convert-") as folder:
        inside, written = Path(folder, "weights.pt"), Path(folder, "weights.safetensors")
        shutil.copyfile(file, inside)
        kept = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "LANG")
        environment = {name: os.environ[name] for name in kept if name in os.environ} | {
            "HOME": folder,
            "TMPDIR": folder,
            "YOLO_CONFIG_DIR": folder,
            "YOLO_OFFLINE": "1",
            "YOLO_AUTOINSTALL": "0",
            "YOLO_VERBOSE": "0",
        }
        command = [sys.executable, "-I", unpickling.__file__, str(inside), str(written)]
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if run.returncode == unpickling.REFUSED:
            raise InputError("FILE", str(file), run.stderr.strip().splitlines()[-1])
        try:
            return dict(load_file(written))
        except (SafetensorError, OSError):
            last = (run.stderr.strip().splitlines() or ["it said nothing"])[-1]
            reason = f"was not converted; the process ended with {run.returncode} ({last})"
            raise InputError("FILE", str(file), reason) from None
