"""The quiet slot, with real processes and real locks."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from evaluators.quiet import QuietSlot, default_directory
from spaces.errors import InputError

pytestmark = pytest.mark.timeout(60)  # a deadlock is what could go wrong here

ROOT = Path(__file__).resolve().parents[2]

# A process that computes or measures in a loop, and prints when: the monotonic clock is the machine's.
LOOP = """
import sys, time
from pathlib import Path
from evaluators.quiet import QuietSlot
kind, directory, inside, until = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
slot = QuietSlot(directory)
spans = []
while time.monotonic() < until:
    with slot.computing() if kind == "computing" else slot.quiet():
        start = time.monotonic()
        while time.monotonic() < start + inside:
            pass
        spans.append((start, time.monotonic()))
for start, end in spans:
    print(start, end)
print(slot.waited_seconds, file=sys.stderr)
"""

# A process that takes the slot, says so, and keeps it until it is told to go on or is killed.
HOLD = """
import sys
from pathlib import Path
from evaluators.quiet import QuietSlot
slot = QuietSlot(Path(sys.argv[2]))
with slot.computing() if sys.argv[1] == "computing" else slot.quiet():
    print("inside", flush=True)
    sys.stdin.readline()
print("left", flush=True)
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with start(HOLD, "quiet", tmp_path) as process:
        assert line_of(process) == "inside"
        yield process
        process.kill()


def entered(context: object, within: float) -> bool:
    """Whether a thread that waits for `context` gets in; it stays behind, waiting, if not."""
    done = threading.Event()

    def enter() -> None:
        with context:  # type: ignore[attr-defined]
            done.set()

    threading.Thread(target=enter, daemon=True).start()
    return done.wait(within)


def test_steps_run_side_by_side_and_measurements_alone(tmp_path: Path) -> None:
    slot = QuietSlot(tmp_path)
    with slot.computing():
        assert entered(QuietSlot(tmp_path).computing(), within=5)
        assert not entered(QuietSlot(tmp_path).quiet(), within=0.2)


def test_no_starvation_with_four_computing_and_two_measuring(tmp_path: Path) -> None:
    until = time.monotonic() + 3.5
    computing = [start(LOOP, "computing", tmp_path, 0.004, until) for _ in range(4)]
    measuring = [start(LOOP, "quiet", tmp_path, 0.004, until) for _ in range(2)]
    spans, waited = {}, {}
    for process in computing + measuring:
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        spans[process.pid] = [tuple(map(float, line.split())) for line in out.splitlines()]
        waited[process.pid] = float(err)

    alone = sorted(span for process in measuring for span in spans[process.pid])
    steps = sorted(span for process in computing for span in spans[process.pid])
    for (_, end), (begin, _) in pairwise(alone):
        assert end <= begin, "two measurements at once"
    quiet = iter([*alone, (float("inf"), float("inf"))])
    begin, end = next(quiet)
    for step_begin, step_end in steps:
        while end <= step_begin:
            begin, end = next(quiet)
        assert step_end <= begin, "a step ran during a measurement"

    counts = {pid: len(of_process) for pid, of_process in spans.items()}
    assert min(counts.values()) >= 10
    of_measuring = sorted(counts[process.pid] for process in measuring)
    assert of_measuring[1] <= 2 * of_measuring[0], "one measuring process overtakes the other"
    # Every step that was held up went before the next measurement, so all advance at a like pace.
    assert sum(of_measuring) <= 1.5 * min(counts[process.pid] for process in computing)
    assert all(0 < seconds < 4 for seconds in waited.values())


def test_a_waiting_measurement_stops_new_steps(tmp_path: Path) -> None:
    with start(HOLD, "computing", tmp_path) as step:
        assert line_of(step) == "inside"  # before the measurement asks, which would keep it out
        with start(HOLD, "quiet", tmp_path) as measurement:
            deadline = time.monotonic() + 20
            while entered(QuietSlot(tmp_path).computing(), within=0.2):
                assert time.monotonic() < deadline, "steps go on although a measurement waits"
            step.communicate("go on\n")
            assert line_of(measurement) == "inside"
            measurement.kill()


def test_kill_frees_the_slot(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    slot = QuietSlot(tmp_path)
    assert not entered(slot.computing(), within=0.3)  # its thread may start late
    os.kill(holder.pid, signal.SIGKILL)
    assert entered(slot.quiet(), within=5)
    assert entered(slot.computing(), within=5)
    assert slot.waited_seconds >= 0.2


def test_a_killed_step_frees_the_slot(tmp_path: Path) -> None:
    with start(HOLD, "computing", tmp_path) as process:
        assert line_of(process) == "inside"
        assert not entered(QuietSlot(tmp_path).quiet(), within=0.2)
        os.kill(process.pid, signal.SIGKILL)
    assert entered(QuietSlot(tmp_path).quiet(), within=5)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_keep_its_parents_lock(tmp_path: Path) -> None:
    slot = QuietSlot(tmp_path)
    with slot.quiet():
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
    try:
        assert entered(QuietSlot(tmp_path).computing(), within=5)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_an_exception_frees_the_slot(tmp_path: Path) -> None:
    slot = QuietSlot(tmp_path)
    for context in (slot.quiet(), slot.computing()):
        with pytest.raises(ZeroDivisionError), context:
            _ = 1 / 0
    assert entered(QuietSlot(tmp_path).quiet(), within=5)


def test_measuring_inside_a_step_is_an_error_not_a_deadlock(tmp_path: Path) -> None:
    slot, other = QuietSlot(tmp_path), QuietSlot(tmp_path)
    for outer, name in ((slot.computing, "computing"), (slot.quiet, "quiet")):
        with outer(), pytest.raises(RuntimeError, match=rf"quiet\(\) inside {name}\(\)"), other.quiet():
            pass
    with slot.quiet():
        pass


def test_steps_nest(tmp_path: Path) -> None:
    slot = QuietSlot(tmp_path)
    with slot.computing():
        with slot.computing():
            pass
        assert not entered(QuietSlot(tmp_path).quiet(), within=0.1), "the inner step has ended the outer"


def test_deleted_lock_files_are_made_again(tmp_path: Path) -> None:
    slot = QuietSlot(tmp_path)
    with slot.computing():
        pass
    for file in tmp_path.iterdir():
        file.unlink()
    with QuietSlot(tmp_path).quiet(), start(HOLD, "computing", tmp_path) as process:
        assert not entered(slot.computing(), within=0.2)
        process.kill()


def test_uncontended_steps_wait_for_nothing(tmp_path: Path) -> None:
    slot = QuietSlot(tmp_path)
    for _ in range(100):
        with slot.computing():
            pass
    assert slot.waited_seconds == 0.0
    assert pickle.loads(pickle.dumps(slot)).directory == tmp_path


def test_the_directory_must_be_ours(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch()
    for name in ("link", "file", "file/below"):
        with pytest.raises(InputError, match="quiet slot"):
            QuietSlot(tmp_path / name)
    assert default_directory().name.endswith(str(os.getuid()))
