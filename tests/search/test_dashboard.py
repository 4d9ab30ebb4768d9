"""The dashboard over a study: what its page reads, what a browser shows, and who can reach it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna_dashboard import save_note

from evaluators.datasets.digits import write_digits
from search.benchmarks.made_up import MadeUpSearch
from search.benchmarks.many_trials import fill
from search.chosen import front_numbers
from search.front import front_of
from search.study import SearchStudy
from search.study_page import show_on_page
from search.trials import is_feasible

ROOT = Path(__file__).resolve().parents[2]
SECRET = "pa55word-of-the-database"
TRIALS, PARAMETERS = 12, 40
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000")
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")


@dataclass(frozen=True)
class Served:
    """A running dashboard over a study."""

    study: SearchStudy
    url: str
    port: int
    process: subprocess.Popen[str]

    def read(self, path: str) -> bytes:
        return read(self.port, path)

    def json(self, path: str) -> Any:
        return json.loads(self.read(path))


def read(port: int, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
        content: bytes = answer.read()
        return content


@contextlib.contextmanager
def dashboard(storage: str, port: int, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`paredown dashboard` in a process of its own, listening."""
    command = [sys.executable, str(ROOT / "scripts" / "dashboard.py"), "--storage", storage, *options]
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("dashboard")
    search, url, port = MadeUpSearch(PARAMETERS), f"sqlite:///{folder}/paredown.db", free_port()
    study = search.study("shown", url, folder)
    fill(search, study, TRIALS, lambda line: None)
    with dashboard(url, port) as process:
        yield Served(study, f"http://127.0.0.1:{port}", port, process)


def test_the_page_reads_every_trial_with_its_limits_and_names(served: Served) -> None:
    (listed,) = served.json("/api/studies")["study_summaries"]
    assert (listed["study_name"], listed["directions"]) == ("shown", ["maximize", "minimize"])
    detail = served.json(f"/api/studies/{listed['study_id']}?after=0")
    assert detail["objective_names"] == ["map", "latency_ms"]
    assert len(detail["trials"]) == TRIALS
    for shown, trial in zip(detail["trials"], served.study.optuna.get_trials(), strict=True):
        assert shown["state"] == "Complete"
        assert shown["values"] == trial.values
        assert len(shown["params"]) == PARAMETERS
        assert shown["constraints"] == trial.system_attrs["constraints"]
        assert all(c <= 0 for c in shown["constraints"]) == is_feasible(trial)
        attributes = {attribute["key"] for attribute in shown["user_attrs"]}
        assert {"recipe", "evaluation"} <= attributes
    assert {is_feasible(trial) for trial in served.study.optuna.get_trials()} == {True, False}


def test_the_note_has_the_front_and_its_picture(served: Served) -> None:
    study_id = served.study.optuna._study_id
    detail = served.json(f"/api/studies/{study_id}?after=0")
    note = detail["note"]["body"]
    for number in front_numbers(served.study):
        assert f"\n| {number} | " in note
    link = re.search(r"!\[front\]\((\S+)\)", note)
    assert link is not None
    assert served.read(link.group(1)).startswith(b"\x89PNG")
    assert [artifact["filename"] for artifact in detail["artifacts"]] == ["front.png"]
    assert detail["artifacts"][0]["artifact_id"] in link.group(1)


def test_it_listens_on_loopback_alone(served: Served) -> None:
    listening = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if not Path(table).exists():
            pytest.skip("needs Linux's /proc/net")
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, port = local.rsplit(":", 1)
            if state == "0A" and int(port, 16) == served.port:
                listening.append(address)
    assert listening == ["0100007F"]  # 127.0.0.1, the lowest byte first


def test_a_browser_shows_the_study(served: Served, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser here: {', '.join(BROWSERS)}")
    page = f"{served.url}/dashboard/studies/{served.study.optuna._study_id}"
    profile = f"--user-data-dir={tmp_path / 'profile'}"

    def shown(path: str) -> str:
        command = [browser, *OPTIONS, profile, "--dump-dom", page + path]
        return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout

    overview = shown("")
    for text in ("Pareto Front", "Objective X", ">map<", ">latency_ms<", "Infeasible"):
        assert text in overview, text
    trials = shown("/trials")
    assert f"{TRIALS} Trials" in trials
    assert all(f"Trial {number}" in trials for number in front_numbers(served.study))
    note = shown("/note")
    assert "Front of shown" in note
    assert re.search(r'<img[^>]+src="/artifacts/\d+/', note)


def test_the_picture_is_replaced_and_notes_of_readers_stay(tmp_path: Path) -> None:
    search = MadeUpSearch(PARAMETERS)
    study = search.study("noted", f"sqlite:///{tmp_path}/n.db", tmp_path)
    fill(search, study, 4, lambda line: None)
    picture = tmp_path / "front.png"
    for content in (b"first", b"second"):
        picture.write_bytes(content)
        assert show_on_page(study, front_of(study), picture)
    stored = [file for file in study.artifacts.iterdir() if file.is_file()]
    assert [file.read_bytes() for file in stored] == [b"second"]
    save_note(study.optuna, "What I think of it")
    assert not show_on_page(study, front_of(study), picture)


@pytest.mark.slow
def test_a_password_is_printed_by_no_part_of_a_search(tmp_path: Path, postgres: str) -> None:
    """A whole search, its front and its dashboard on PostgreSQL; the server trusts its socket."""
    url = re.sub(r"//([^:@/]+)(:[^@/]*)?@", rf"//\1:{SECRET}@", postgres)
    assert SECRET in url
    write_digits(tmp_path / "digits", images={"fit": 8, "select": 6, "report": 4})
    document = {
        "model": "yolox_digits",
        "checkpoint": str(ROOT / "scripts" / "configs" / "yolox_digits.safetensors"),
        "data": {"root": "digits"},
        "search": {"trials": 2, "workers": 1, "sampler": "random", "seeds": False},
        "finetune": {"epochs": 0, "mirror": False},
        "latency": {"images": 2, "min_rounds": 8, "max_rounds": 8, "time_limit_s": 0.2},
        "calibration_images": 2,
    }
    (tmp_path / "secret.yaml").write_text(yaml.safe_dump(document))
    said = []
    commands = (
        ["search", "secret.yaml"],
        ["search", "secret.yaml", "--trials", "1"],  # has its trials already
        ["search", "secret.yaml", "--epochs", "1"],  # another budget: refused
        ["front", "--study", "secret"],
        ["front", "--study", "unknown"],
        ["explain", "0", "--study", "secret"],
    )
    for name, *rest in commands:
        run = [sys.executable, "-c", "import sys; from search.cli import main; sys.exit(main())", name, *rest]
        done = subprocess.run(
            [*run, "--storage", url],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=400,
            start_new_session=True,
        )
        said.append(done.stdout + done.stderr)
        assert "Traceback" not in said[-1], said[-1]
    assert "study secret in postgresql://" in said[0]
    assert "2 trials" in said[0]
    assert "***" in said[0]
    port = free_port()
    with dashboard(url, port, "--study", "secret") as process:
        said += [read(port, path).decode() for path in ("/api/studies", "/api/meta")]
        for listed in json.loads(said[-2])["study_summaries"]:
            said.append(read(port, f"/api/studies/{listed['study_id']}?after=0").decode())
        process.terminate()
        said.append(process.communicate(timeout=30)[0])
    assert f"http://127.0.0.1:{port}/" in said[-1]
    assert [text for text in said if SECRET in text] == []
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(file.name == "front.html" for file in written)
    assert [file for file in written if SECRET.encode() in file.read_bytes()] == []
