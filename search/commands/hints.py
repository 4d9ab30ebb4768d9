"""The exact commands that a user can type next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from search.commands.options import DEFAULT_STORAGE


def command(name: str, *arguments: str) -> str:
    """`paredown NAME ARGUMENTS`, with the program's path where it is not on the search path."""
    from search.storage import mask_url  # SQLAlchemy is behind it

    return f"{_program()} {shlex.join([name, *(mask_url(text) for text in arguments)])}"


def of_study(name: str, study: str, storage: str, *arguments: str) -> str:
    """A command about a study; the storage is left out where it is the default."""
    place = [] if storage == DEFAULT_STORAGE else ["--storage", storage]
    return command(name, "--study", study, *place, *arguments)


def same_again(name: str, **changed: object) -> str:
    """The command that is running, with some of its options changed, such as `trials=80`."""
    arguments = sys.argv[1:]
    if arguments[:1] == [name]:
        arguments = arguments[1:]
    for option, value in changed.items():
        arguments = [*_without(arguments, f"--{option}"), f"--{option}", str(value)]
    return command(name, *arguments)


def _without(arguments: list[str], option: str) -> list[str]:
    kept, skip = [], False
    for text in arguments:
        if skip or text.startswith(f"{option}="):
            skip = False
        elif text == option:
            skip = True
        else:
            kept.append(text)
    return kept


def _program() -> str:
    beside_python = Path(sys.executable).with_name("paredown")
    found = shutil.which("paredown")
    if found is not None and Path(found).resolve() == beside_python.resolve():
        return "paredown"
    if not beside_python.is_file():
        return f"{shlex.quote(sys.executable)} -m search.cli"
    relative = os.path.relpath(beside_python)
    return shlex.quote(str(beside_python) if relative.startswith("..") else relative)
