"""The command line: `paredown COMMAND`. One file a command in `search.commands`.

Exit codes: 0, 1 where a search cannot go on, 2 for bad input (one line on stderr), 130 after Ctrl-C.
Nothing heavy is imported before a command needs it, so that help is there at once.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated

import typer

from search.commands.benchmark import benchmark
from search.commands.convert import convert
from search.commands.dashboard import dashboard
from search.commands.evaluate import evaluate
from search.commands.explain import explain
from search.commands.finish import finish
from search.commands.front import show_front
from search.commands.init import init
from search.commands.search import search
from search.commands.train import train
from spaces.errors import InputError

BAD_INPUT, INTERRUPTED = 2, 130

FULL = (errno.ENOSPC, errno.EDQUOT)
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
"""Of places on the disk, which no program can be written against."""

app = typer.Typer(
    name="paredown",
    help="Pare an object detector down: search how to prune and quantise it, measure every candidate.",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("search")(search)
app.command("front")(show_front)
app.command("explain")(explain)
app.command("evaluate")(evaluate)
app.command("finish")(finish)
app.command("dashboard")(dashboard)
app.command("init")(init)
app.command("train")(train)
app.command("convert")(convert)
app.add_typer(benchmark, name="benchmark")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"paredown {version('paredown')}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    Args:
        arguments: of the command line without the program; those of this process if None.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # libraries' talk to programmers; -W or PYTHONWARNINGS brings it back
    try:
        with _typed(arguments):
            code = app(standalone_mode=False)
    except InputError as error:
        return _complain(_one_line(str(error)), BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("stopped", INTERRUPTED)
    except BrokenPipeError:  # `paredown front | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in FULL:  # writing to an open file names none
            place = "" if error.filename is None else f"{error.filename}: "
            return _complain(f"{place}{error.strerror}", 1)
        if error.filename is None or error.errno not in UNUSABLE:
            raise
        return _complain(f"{error.filename}: {error.strerror}", BAD_INPUT)
    except Exception as error:
        if type(error).__name__ == "StorageInternalError":  # optuna's; importing it would cost a second
            return _complain(f"the database does not answer: {_innermost(error)}", 1)
        # Usage errors: typer brings its own copy of click, so their class has no name that lasts.
        if not hasattr(error, "format_message"):
            raise
        return _complain(_one_line(str(error.format_message())), BAD_INPUT)
    return code if isinstance(code, int) else 0


@contextmanager
def _typed(arguments: Sequence[str] | None) -> Iterator[None]:
    """Arguments that a script hands over are shown in what to type next as if they had been typed."""
    before = sys.argv
    sys.argv = before if arguments is None else [*before[:1], *arguments]
    try:
        yield
    finally:
        sys.argv = before


def _innermost(error: BaseException) -> str:
    """What a database said, without the statement and its values; it names no password."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _one_line(str(error).splitlines()[0]) if str(error) else type(error).__name__


def _complain(line: str, code: int) -> int:
    print(f"paredown: {line}", file=sys.stderr)
    return code


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
