"""`paredown convert`: a PyTorch weights file made into safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from search.commands.options import note, say


def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="PyTorch file, .pt or .pth.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Default: FILE with .safetensors at its end.", metavar="FILE"),
    ] = None,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Run what is in the file, once, in a process of its own."),
    ] = False,
) -> int:
    """Make safetensors of a PyTorch file, for --checkpoint; names and numbers stay.

    Files of tensors are converted as they are. Pickles of whole networks, such as Ultralytics' .pt files, are
    programs; they need --trust. Give it only to files whose origin you know.
    """
    from spaces.detectors.conversion import convert as converted

    if trust:
        note(f"--trust runs what is in {file.name} with your rights, in a process that hands back tensors")
    written = output or file.with_suffix(".safetensors")
    count = converted(file, written, trust)
    say(f"wrote {written}: {count} tensors")
    return 0
