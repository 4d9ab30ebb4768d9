"""The quiet slot: while one process of ours takes a latency, no other computes on this machine.

Workers compute in steps (a training step, an export, a scoring), each inside `slot.computing()`;
a latency is taken inside `slot.quiet()`. The locks are `flock`s, so the kernel frees them when their
holder dies, however it dies. All studies of a user on one machine share the slot.

Five locks make it fair in both directions:

    work      shared by computing steps, exclusive for a measurement: the exclusion itself
    gate      passed by every step on its way to `work`, held by a measurement from its arrival to its
              end: steps that run may end, new ones wait, so that steps cannot starve measurements
    held_up   shared by the steps that wait at the gate; a measurement that has ended waits until all of
              them are through before the next one may close the gate: measurements cannot starve steps
    turn      held by the measurement in progress, so that measurements come one at a time
    line      held by the next in line while it waits for `turn`: a process that measures again and again
              cannot overtake another one that waits
"""

from __future__ import annotations

import fcntl
import os
import stat
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spaces.errors import InputError

_NAMES = ("work", "gate", "held_up", "turn", "line")


def default_directory() -> Path:
    """The user's lock directory on this machine.

    Neither `$TMPDIR` nor `$XDG_RUNTIME_DIR` is asked: a study started from cron must meet one started
    from a desktop.
    """
    return Path(f"/tmp/paredown-quiet-{os.getuid()}")


class QuietSlot:
    """This process's access to the quiet slot of the machine.

    Cheap to make and to pickle; safe in threads, each of which counts as a process of its own. A step
    must not wait for another thread's step: threads that serve a step need no `computing()` themselves.

    Args:
        directory: where the lock files live; all that shall keep quiet for each other name the same one.

    Raises:
        InputError: the directory cannot be made, or belongs to somebody else.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = _private_directory(directory or default_directory())
        self._waited = 0.0
        self._waited_lock = threading.Lock()

    def __reduce__(self) -> tuple[type[QuietSlot], tuple[Path]]:
        return QuietSlot, (self.directory,)

    @property
    def waited_seconds(self) -> float:
        """Seconds spent waiting for the slot so far, steps and measurements together.

        It is time in which the process was suspended: take it off whatever is held against a timeout.
        """
        return self._waited

    @contextmanager
    def computing(self) -> Iterator[None]:
        """A step of work; waits while a measurement is waiting or running. Microseconds otherwise.

        Inside another step, or inside `quiet()`, it does nothing.
        """
        locks = _locks_of_thread(self.directory)
        if locks.held:
            yield
            return
        try:
            self._pass_gate(locks)
            locks.held = "computing"
            yield
        finally:
            locks.held = ""
            locks.free("work", "gate", "held_up")

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """A measurement; waits for the running steps to end and keeps new ones from starting.

        Raises:
            RuntimeError: inside `computing()` or `quiet()` of the same thread, which would wait for itself
                for ever.
        """
        locks = _locks_of_thread(self.directory)
        if locks.held:
            raise RuntimeError(
                f"quiet() inside {locks.held}() of the same thread would wait for itself: "
                "end the step before you measure"
            )
        my_turn = False
        started = time.monotonic()
        try:
            locks.take("line", fcntl.LOCK_EX)
            locks.take("turn", fcntl.LOCK_EX)
            my_turn = True
            locks.free("line")
            locks.take("gate", fcntl.LOCK_EX)
            locks.take("work", fcntl.LOCK_EX)
            self._add_wait(started)
            locks.held = "quiet"
            yield
        finally:
            locks.held = ""
            locks.free("line", "work", "gate")
            try:
                if my_turn:
                    # Ends soon: the gate is open, and nobody joins those held up while it is.
                    locks.take("held_up", fcntl.LOCK_EX)
            finally:
                locks.free("held_up", "turn")

    def _pass_gate(self, locks: _Locks) -> None:
        if not locks.take("gate", fcntl.LOCK_SH | fcntl.LOCK_NB):
            started = time.monotonic()
            locks.take("held_up", fcntl.LOCK_SH)
            locks.take("gate", fcntl.LOCK_SH)
            self._add_wait(started)
        locks.take("work", fcntl.LOCK_SH)
        locks.free("gate", "held_up")

    def _add_wait(self, started: float) -> None:
        with self._waited_lock:
            self._waited += time.monotonic() - started


class _Locks:
    """One thread's own opening of the lock files: a `flock` belongs to an opening, not to a thread."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.held = ""  # "computing" or "quiet" while this thread is inside
        self.files: dict[str, int] = {}
        _all_locks.add(self)

    def __del__(self) -> None:
        self.close()

    def open_current(self) -> None:
        """Open the files, again if somebody (a cleaner of /tmp) has deleted those that are open."""
        if self.files and all(os.fstat(file).st_nlink for file in self.files.values()):
            return
        self.close()
        _private_directory(self.directory)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        for name in _NAMES:
            self.files[name] = os.open(self.directory / f"{name}.lock", flags, 0o600)

    def close(self) -> None:
        while self.files:
            os.close(self.files.popitem()[1])

    def take(self, name: str, operation: int) -> bool:
        """Lock a file; False where that would have to wait and `operation` says not to."""
        try:
            fcntl.flock(self.files[name], operation)
        except BlockingIOError:
            return False
        return True

    def free(self, *names: str) -> None:
        """Unlock; harmless where nothing is held."""
        for name in names:
            if name in self.files:  # a forked child holds none
                fcntl.flock(self.files[name], fcntl.LOCK_UN)


class _Thread(threading.local):
    """The calling thread's locks by directory."""

    def __init__(self) -> None:
        self.locks: dict[Path, _Locks] = {}


_all_locks: weakref.WeakSet[_Locks] = weakref.WeakSet()
_this_thread = _Thread()


def _locks_of_thread(directory: Path) -> _Locks:
    """The calling thread's locks in a directory, shared by all its slots so that they know of each other."""
    locks = _this_thread.locks.get(directory)
    if locks is None:
        locks = _this_thread.locks[directory] = _Locks(directory)
    if not locks.held:
        locks.open_current()
    return locks


def _forget_in_child() -> None:
    """A forked child would keep its parent's locks alive: it closes them and opens its own when needed."""
    for locks in list(_all_locks):
        locks.close()
        locks.held = ""


os.register_at_fork(after_in_child=_forget_in_child)


def _private_directory(directory: Path) -> Path:
    directory = directory.absolute()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise InputError("quiet slot", str(directory), f"cannot be made: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise InputError("quiet slot", str(directory), "is not a directory of this user: remove it")
    return directory
