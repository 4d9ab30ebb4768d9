"""Starting Ray for one run: on loopback, small, silent, and gone without a trace afterwards."""

from __future__ import annotations

import fcntl
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from search.workers import Pool
from spaces.errors import InputError

# Ray reads it when it is imported, so it cannot be scoped. What the user has set wins.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray._private import ray_logging, services

_PREFIX = "paredown-ray-"
_OBJECT_STORE_BYTES = 80 * 2**20  # Ray's minimum is 75 MiB; jobs and reports are a few kilobytes
_LOOPBACK = "127.0.0.1"


@contextmanager
def running_ray(pool: Pool) -> Iterator[Path]:
    """Yield a scratch folder with Ray running; a Ray that runs already is used and left running.

    Raises:
        InputError: the cluster at `pool.address` cannot be joined.
    """
    _remove_stale_folders()
    scratch = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_short_temporary_folder()))
    lock = os.open(scratch / ".lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the kernel when we die, however we die
    try:
        if ray.is_initialized():
            yield scratch
        elif pool.address is not None:
            with _silent_on_deaths(), _joined(pool, pool.address):
                yield scratch
        else:
            with _silent_on_deaths(), _local(pool, scratch):
                yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


@contextmanager
def _silent_on_deaths() -> Iterator[None]:
    """Keep Ray from printing that a worker died: we report it ourselves.

    Ray has a variable for it, which it reads when it is imported, and others may have imported it before.
    """
    printing = ray_logging.stdout_deduplicator
    before = printing.skip_re
    printing.skip_re = before or re.compile("A worker died or was killed")
    try:
        yield
    finally:
        printing.skip_re = before


_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}


@contextmanager
def _joined(pool: Pool, address: str) -> Iterator[None]:
    try:
        ray.init(address=address, runtime_env={"env_vars": pool.worker_environment}, **_QUIET)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError("address", address, f"no Ray cluster there: {reason}") from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _local(pool: Pool, scratch: Path) -> Iterator[None]:
    # Without these two Ray replaces 127.0.0.1 by the machine's address and listens on all interfaces.
    # The constant is the variable as it was when Ray was imported, the variable is for Ray's processes.
    constants = ray._private.ray_constants
    before = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER = False
    try:
        # Workers inherit theirs: with an environment of their own, Ray could not take the processes that it
        # starts in advance, and the first job would wait for new ones.
        variables = {
            **pool.worker_environment,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_process_group_cleanup_enabled": "1",
            # Ray's own 15 would let everybody else's processes into a latency; `nice paredown` still is.
            "RAY_worker_niceness": os.environ.get("RAY_worker_niceness", "0"),  # noqa: SIM112 (as Ray spells it)
        }
        with environment(variables), _group_of_its_own():
            ray.init(
                num_cpus=math.ceil(pool.workers * pool.cpus_per_worker),
                num_gpus=math.ceil(pool.workers * pool.gpus),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _node_ip_address=_LOOPBACK,
                _temp_dir=str(scratch),
                **_QUIET,
            )
        address = ray.nodes()[0]["NodeManagerAddress"]  # type: ignore[no-untyped-call]
        if address != _LOOPBACK:
            raise RuntimeError(f"Ray {ray.__version__} listens on {address} although told to use loopback")
        yield
    finally:
        ray.shutdown()
        constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _group_of_its_own() -> Iterator[None]:
    """Ray's processes that start in this block belong to process groups of their own.

    `timeout` and shells signal our whole group. Where Ray's processes ended then, Ray's native code would end
    this one as well, with status 1 and words of its own. Outside Linux, Ray needs the group to end them all.
    """
    before = services.ConsolePopen

    class Apart(before):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options, process_group=0)

    if sys.platform == "linux":
        services.ConsolePopen = Apart  # type: ignore[misc]
    try:
        yield
    finally:
        services.ConsolePopen = before  # type: ignore[misc]


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the length of a block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _short_temporary_folder() -> str:
    """Ray puts sockets some 70 characters below; their paths may have 107 (103 on macOS)."""
    folder = tempfile.gettempdir()
    return folder if len(folder) <= 16 else "/tmp"


def _remove_stale_folders() -> None:
    """Remove what drivers left behind that were killed: folders whose lock nobody holds."""
    for lock_file in Path(_short_temporary_folder()).glob(f"{_PREFIX}*/.lock"):
        with suppress(OSError):  # somebody else's, or removed meanwhile
            if time.time() - lock_file.stat().st_mtime < 60:
                continue  # perhaps made a moment ago and not locked yet
            descriptor = os.open(lock_file, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock_file.parent, ignore_errors=True)
            finally:
                os.close(descriptor)
