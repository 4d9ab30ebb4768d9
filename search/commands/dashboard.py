"""`paredown dashboard`: Optuna's dashboard over the studies, on this machine only."""

from __future__ import annotations

import errno
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.commands.options import DEFAULT_STORAGE, OptionalStudyName, Storage

if TYPE_CHECKING:
    from search.study import SearchStudy


def dashboard(
    storage: Storage = DEFAULT_STORAGE,
    study: OptionalStudyName = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; the default is reachable from here only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on.")] = 8080,
) -> int:
    """Show all trials in a browser until Ctrl-C. Files are served of --study, or of the newest study.

    Its page gets the front as it is now: a note with the table, and the picture.
    """
    import optuna
    import optuna_dashboard  # type: ignore[import-untyped]

    from search.storage import open_storage
    from search.study import load_study
    from spaces.errors import InputError

    database = open_storage(storage, create=False)
    _check_free(host, port)
    names = [study] if study else _newest_first(optuna.get_all_study_summaries(database))
    if not names:
        raise InputError("storage", None, "holds no study yet; run paredown search CONFIG first")
    opened = load_study(names[0], url=storage)
    _show_front(opened)
    print(
        f"http://{host}:{port}/    {opened.shown_url}, files of study {opened.name}; Ctrl-C stops", flush=True
    )
    optuna_dashboard.run_server(database, host=host, port=port, artifact_store=opened.store)
    return 0


def _show_front(study: SearchStudy) -> None:
    """Put the front on the study's page, once there is one."""
    from search.front import front_of, subtitle_of, write_pictures
    from search.judge import base_number
    from search.study_page import show_on_page

    if base_number(study) is None:
        return
    front = front_of(study)
    with tempfile.TemporaryDirectory() as folder:
        picture, *_ = write_pictures(front, Path(folder), f"Front of {study.name}", subtitle_of(study))
        if not show_on_page(study, front, picture):
            print(
                "the study has a note already, which stays; the front is shown by paredown front", flush=True
            )


def _newest_first(summaries: list) -> list[str]:  # type: ignore[type-arg]
    """Names of our studies; others may share the database."""
    from search.study import FINGERPRINT

    started = [s for s in summaries if s.datetime_start is not None and FINGERPRINT in s.user_attrs]
    return [s.study_name for s in sorted(started, key=lambda s: s.datetime_start, reverse=True)]


def _check_free(host: str, port: int) -> None:
    from spaces.errors import InputError

    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        elsewhere = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        field, value = ("--host", host) if elsewhere else ("--port", str(port))
        raise InputError(
            field, value, f"cannot listen on {host}:{port} ({error.strerror}); try another"
        ) from None
