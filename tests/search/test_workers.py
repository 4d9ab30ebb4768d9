"""Jobs on real Ray workers: order, limits, failures as data, stopping."""

from __future__ import annotations

import glob
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_workers
import pytest

from evaluators.jobs import Job, StageReport
from search.processes import process_started
from search.workers import FINISHED, Finished, Pool, StopRequest, WorkersUnusableError, run_jobs
from spaces.errors import InputError

HERE = Path(__file__).resolve().parent


class Listed:
    """A source over a list of jobs that writes down what happens."""

    def __init__(self, jobs: list[Job], workers: int = 2) -> None:
        self.waiting, self.workers = deque(jobs), workers
        self.live: dict[str, int] = {}
        self.most_live = 0
        self.results: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, tuple[str, str, str]] = {}
        self.returned: dict[str, str] = {}
        self.stages: list[tuple[str, str]] = []
        self.on_started = lambda job: None

    def next_job(self) -> Job | Finished | None:
        assert len(self.live) < self.workers, "asked for a job although no worker is free"
        if not self.waiting:
            return None if self.live else FINISHED
        job = self.waiting.popleft()
        self.live[job.name] = -1
        self.most_live = max(self.most_live, len(self.live))
        return job

    def started(self, job: Job, worker: int) -> None:
        assert worker not in self.live.values()
        self.live[job.name] = worker
        self.on_started(job)

    def progress(self, job: Job, report: StageReport) -> None:
        self.stages.append((job.name, report.stage))

    def done(self, job: Job, result: dict[str, Any]) -> None:
        del self.live[job.name]
        self.results[job.name] = result

    def failed(self, job: Job, stage: str, reason: str, traceback: str) -> None:
        del self.live[job.name]
        self.failures[job.name] = (stage, reason, traceback)

    def interrupted(self, job: Job, stage: str) -> None:
        self.returned[job.name] = stage

    def tick(self) -> None:
        pass


def probe(name: str, **payload: Any) -> Job:
    return Job(kind="probe", name=name, payload=payload)


def test_failures_are_data_and_workers_are_kept(pool: Pool, capfd: pytest.CaptureFixture[str]) -> None:
    troubles = ["raise", "exit", "kill", "no result"]
    jobs = [probe(f"good {i}") for i in range(3)]
    jobs += [probe(trouble, trouble=trouble) for trouble in troubles]
    jobs += [probe(f"late {i}") for i in range(5)]
    source = Listed(jobs)

    assert run_jobs(source, fake_workers.ToyWorker, replace(pool, pin_cores=True))

    assert set(source.results) == {job.name for job in jobs} - set(troubles)
    assert not source.returned
    assert source.most_live == 2
    stage, reason, traceback = source.failures["raise"]
    assert (stage, reason) == ("finetune", "ValueError: loss is not finite")
    assert "fake_workers.py" in traceback
    for died in ("exit", "kill"):
        stage, reason, traceback = source.failures[died]
        assert stage == "finetune"
        assert "process died" in reason
        assert traceback == ""
    assert "without a result" in source.failures["no result"][1]
    assert source.stages.count(("good 0", "prune")) == 1
    assert [s for n, s in source.stages if n == "late 4"] == ["prune", "finetune", "score"]

    # Two workers at first, and one new one for each that died: nothing else is ever started.
    pids = {r["pid"] for r in source.results.values()}
    assert len(pids) <= 4
    assert max(r["jobs_done"] for r in source.results.values()) >= 3
    assert {r["threads"] for r in source.results.values()} == {"1"}
    assert {tuple(r["cores"]) for r in source.results.values()} == {
        (c,) for c in range(os.cpu_count() or 1)[:2]
    }
    assert all(math.isnan(r["nan"]) for r in source.results.values())
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""


def test_a_refusing_factory_is_the_users_error(pool: Pool) -> None:
    source = Listed([probe("p")])
    with pytest.raises(InputError, match=r"checkpoint: 'x\.pth': no such file"):
        run_jobs(source, fake_workers.refused, pool)
    assert source.returned == {"p": "start"}
    assert not source.failures


@pytest.mark.parametrize(
    ("factory", "message"),
    [(fake_workers.broken, "RuntimeError: no engine here"), (fake_workers.dying, "died before their job")],
)
def test_workers_that_cannot_start_blame_no_candidate(pool: Pool, factory: Any, message: str) -> None:
    source = Listed([probe("p")])
    with pytest.raises(WorkersUnusableError, match=message):
        run_jobs(source, factory, pool)
    assert source.returned == {"p": "start"}
    assert not source.failures


def test_an_error_of_the_source_ends_the_run_and_comes_out(pool: Pool) -> None:
    source = Listed([probe(f"p{i}") for i in range(3)])

    def full(job: Job, result: dict[str, Any]) -> None:
        raise OSError("disk full")

    source.done = full  # type: ignore[method-assign]
    with pytest.raises(OSError, match="disk full"):
        run_jobs(source, fake_workers.ToyWorker, pool)


def test_a_stop_request_ends_running_workers(pool: Pool) -> None:
    stop, pids = StopRequest(), []
    source = Listed([probe("endless 0"), probe("endless 1"), probe("never")])

    def on_progress(job: Job, report: StageReport) -> None:
        pids.append(job.name)
        if len(pids) == 2:
            stop.set()

    source.progress = on_progress  # type: ignore[method-assign]
    before = time.monotonic()
    assert not run_jobs(source, fake_workers.EndlessWorker, pool, stop)
    assert time.monotonic() - before < 30
    assert source.returned == {"endless 0": "finetune", "endless 1": "finetune"}
    assert [job.name for job in source.waiting] == ["never"]
    assert run_jobs(Listed([probe("after")]), fake_workers.ToyWorker, pool), "the pool is still usable"


DRIVER = """
import sys
import fake_workers, test_workers
from search.workers import Pool, run_jobs
source = test_workers.Listed([test_workers.probe("a"), test_workers.probe("b")])
names = []
def progress(job, report):
    names.append(job.name)
    if len(names) == 2:
        print("both running", flush=True)
source.progress = progress
ended = run_jobs(source, fake_workers.EndlessWorker, Pool(workers=2))
print("ended", ended, sorted(source.returned), flush=True)
"""


@pytest.fixture
def short_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pd", dir="/tmp") as folder:
        yield Path(folder)


@contextmanager
def started_driver(folder: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=HERE.parents[1],
        start_new_session=True,  # its own process group, as a shell gives to a foreground job
    )
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "both running\n"
        yield driver
    finally:
        driver.kill()
        driver.communicate()


def session_members(leader: int) -> list[int]:
    """Processes that belong to the session of `leader`, or descend from it."""
    members = []
    parents: dict[int, int] = {}
    for stat in glob.glob("/proc/[0-9]*/stat"):
        try:
            pid, rest = int(stat.split("/")[2]), Path(stat).read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[pid] = int(rest[1])
        if int(rest[3]) == leader and rest[0] != "Z":
            members.append(pid)
    for pid in parents:
        above = pid
        while above > 1:
            above = parents.get(above, 0)
            if above == leader and pid not in members and process_started(pid):
                members.append(pid)
    return members


def listening_addresses(pids: list[int]) -> set[str]:
    """Local addresses (hex, as in /proc/net/tcp) on which the processes listen."""
    inodes = set()
    for pid in pids:
        for link in glob.glob(f"/proc/{pid}/fd/*"):
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    addresses = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                addresses.add(fields[1].split(":")[0])
    return addresses


def command(pid: int) -> str:
    """Program and script of a process, without options; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").split(" --")[0]
    except OSError:
        return ""


def computing(pids: list[int]) -> list[int]:
    """Without what Ray leaves idle for a minute after a killed driver, in vain attempts to reach it: its
    two agents, and a process that was about to become a worker (workers are called `ray::...`)."""
    idle = ("agent", "default_worker.py")
    return [pid for pid in pids if not any(word in command(pid).lower() for word in idle)]


def left_after(pids: list[int], seconds: float) -> list[str]:
    """Wait until the processes are gone; the commands of those that are not."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process_started(pid) for pid in pids):
        time.sleep(0.2)
    return [command(pid) for pid in pids if process_started(pid)]


LOOPBACK = {
    "0100007F",  # 127.0.0.1
    "0000000000000000FFFF00000100007F",  # ::ffff:127.0.0.1
    "00000000000000000000000001000000",  # ::1
}


def test_ctrl_c_ends_everything_and_only_loopback_listens(short_folder: Path) -> None:
    with started_driver(short_folder) as driver:
        family = session_members(driver.pid)
        assert len(family) >= 4  # driver, raylet, gcs server, two workers ...
        listening = listening_addresses(family)
        assert listening
        assert listening <= LOOPBACK

        os.killpg(driver.pid, signal.SIGINT)  # as a terminal does it: the whole group gets it
        out, err = driver.communicate(timeout=30)
        assert out == "ended False ['a', 'b']\n"
        assert err == ""
        assert driver.returncode == 0
        assert left_after(family, 10) == []
        assert list(short_folder.iterdir()) == []


def test_a_signal_to_the_whole_group_reaches_ray_by_way_of_us(short_folder: Path) -> None:
    with started_driver(short_folder) as driver:
        family = session_members(driver.pid)
        os.killpg(driver.pid, signal.SIGTERM)  # as `timeout` and shells do it
        out, err = driver.communicate(timeout=30)
        assert (driver.returncode, out, err) == (0, "ended False ['a', 'b']\n", "")
        assert left_after(family, 10) == []
        assert list(short_folder.iterdir()) == []


def test_a_stopped_service_ends_although_ray_is_gone_first(short_folder: Path) -> None:
    with started_driver(short_folder) as driver:
        family = session_members(driver.pid)
        for pid in family:  # as systemd does it: Ray's own processes end, too
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        out, err = driver.communicate(timeout=30)
        if driver.returncode == 1:  # Ray's native code ended us, when its object store was gone
            assert out == ""
            assert "core_worker" in err
        else:
            assert (driver.returncode, out, err) in [
                (130, "", "paredown: stopped; finished trials are kept, and the same command goes on\n"),
                (0, "ended False ['a', 'b']\n", ""),
            ]
        assert left_after(computing(family), 10) == []
