"""The command line, run for real: bad input gets one line and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import pickle
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from optuna.exceptions import StorageInternalError

from evaluators.datasets.digits import write_digits
from search.cli import _typed, main
from search.commands.hints import of_study, same_again
from search.config import load_config
from spaces.detectors.registry import make_detector
from spaces.detectors.weights import save_weights

ROOT = Path(__file__).resolve().parents[2]
SECRET = "s3cret"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images of the embedded data, and weights that fit."""
    folder = tmp_path_factory.mktemp("data")
    write_digits(folder / "digits", images={"fit": 4, "select": 3, "report": 3})
    save_weights(make_detector("yolox_digits", 10).build(), folder / "base.safetensors")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(data: Path, /, **changes: Any) -> Path:
    """A configuration that works, but for `changes`; it lies in a folder that is not watched."""
    document = {
        "model": "yolox_digits",
        "checkpoint": str(data / "base.safetensors"),
        "data": {"root": str(data / "digits")},
        "cache": str(data / "cache"),
        **changes,
    }
    file = data / "config.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in document.items() if v is not None}))
    return file


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must be refused, and return its one line."""
    before = sorted(Path.cwd().rglob("*"))
    assert main([str(one) for one in arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("paredown: "), out + err
    assert err.count("\n") == 1, err
    assert sorted(Path.cwd().rglob("*")) == before
    return err


def test_help_is_there_at_once_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from search.cli import main; assert main(['search', '--help']) == 0; "
        "print([m for m in ('torch', 'ray', 'optuna', 'openvino', 'sqlalchemy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "[]"
    for option in ("--storage", "--study", "--threads", "--seed", "--data", "--checkpoint", "--trials"):
        assert option in run.stdout


def test_arguments_of_a_script_are_what_is_proposed_next() -> None:
    """`main([...])` in a user's own script: the command line of that script would be no use."""
    before = sys.argv
    with _typed(["search", "a.yaml", "--trials", "4"]):
        assert same_again("search", trials=8).endswith(" search a.yaml --trials 8")
    assert sys.argv is before


def test_a_place_that_cannot_be_used_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(number: int) -> Callable[..., None]:
        def app(**_: object) -> None:
            raise OSError(number, os.strerror(number), "/a/place")

        return app

    for number, code in ((errno.EROFS, 2), (errno.ENOSPC, 1)):
        monkeypatch.setattr("search.cli.app", fail(number))
        assert main(["front"]) == code
        assert capsys.readouterr().err == f"paredown: /a/place: {os.strerror(number)}\n"
    monkeypatch.setattr("search.cli.app", write_much)
    assert main(["front"]) == 1
    assert capsys.readouterr().err == "paredown: No space left on device\n", "the error names no file"
    monkeypatch.setattr("search.cli.app", fail(errno.EBADF))
    with pytest.raises(OSError, match="Bad file"):
        main(["front"])


def write_much(**_: object) -> None:
    with Path("/dev/full").open("w") as file:
        file.write("x" * 100)


def test_a_database_that_does_not_answer_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: Any) -> None:
        try:
            raise sqlite3.OperationalError("database is locked")
        except sqlite3.OperationalError as error:
            raise StorageInternalError("An exception is raised during the commit.") from error

    monkeypatch.setattr("search.cli.app", fail)
    assert main(["front"]) == 1
    assert capsys.readouterr().err == "paredown: the database does not answer: database is locked\n"


@pytest.mark.parametrize("script", ["search", "front", "evaluate", "finish", "dashboard", "train_baseline"])
def test_every_script_is_a_command(script: str, tmp_path: Path) -> None:
    """From any working directory, and although scripts are called like our packages."""
    file = ROOT / "scripts" / f"{script}.py"
    run = subprocess.run(
        [sys.executable, file, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"Usage: {script}.py {script.split('_')[0]}")


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("paredown 0.")
    assert main([]) == 0
    assert "Commands:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["search"], "CONFIG"),
        (["serach", "x.yaml"], "serach"),
        (["search", "nowhere.yaml"], "cannot be read"),
        (["search", "x.yaml", "--trials", "0"], "--trials"),
        (["search", "x.yaml", "--trials", "many"], "--trials"),
        (["search", "x.yaml", "--colour", "red"], "--colour"),
        (["front"], "--study"),
        (["front", "--study", "a"], "no such file"),
        (["front", "--study", "a", "--storage", "nonsense"], "storage"),
        (["finish", "--study", "a", "--output", "o", "--trial", "-1"], "--trial"),
        (["dashboard", "--port", "99999"], "--port"),
        (["init", "--model", "yolox_nano", "--data", "nowhere"], "no such folder"),
        (["init", "--model", "yolox_mega", "--data", "nowhere"], "unknown; choose one of"),
        (["init", "--model", "yolox_nano", "--data", ".", "--size", "3x2x1"], "--size: '3x2x1': write it as"),
        (
            ["finish", "--study", "s", "--output", "o", "--trial", "1", "--max-map-drop", "1"],
            "--max-map-drop: 1.0: chooses a trial, and --trial 1 is one",
        ),
        (["train", "nowhere.yaml", "--output", "w.safetensors"], "missing"),
        (["train", "nowhere.yaml", "--output", "/proc/w.safetensors"], "cannot be written to"),
        (["finish", "--study", "a", "--output", f"{__file__}/m"], "cannot be written to (Not a directory)"),
    ],
)
def test_bad_arguments(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert said in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "yolox_giant"}, "choose one of"),
        ({"model": "no.such.module:Class"}, "cannot be imported"),
        ({"target": "abacus"}, "choose one of openvino"),
        ({"checkpoint": "nowhere.pth"}, "no such file"),
        ({"checkpoint": None}, "--checkpoint"),
        ({"model": "yolox_nano"}, "made for another model"),
        ({"data": {"root": "nowhere"}}, "no such folder"),
        ({"search": {"sampler": "crystal_ball"}}, "choose front"),
        ({"problem": {"objectives": ["map"]}}, "at least two"),
        ({"name": "a/b"}, "use letters"),
        ({"space": {"methods": ["prayer"]}}, "choose from"),
        ({"space": {"methods": "prune"}}, "write a list, such as [prune]"),
        ({"space": {"methods": []}}, "space.methods: 'none': nothing of this detector could change"),
        ({"size": [320, 320, 3]}, "write it as [height, width] in pixels"),
        ({"threads": 100_000}, "this machine has"),
    ],
)
def test_bad_configurations(
    here: Path, data: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    assert said in refused(capsys, "search", config(data, **changes))


def test_a_cluster_that_is_none(here: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "search", config(data), "--address", "127.0.0.1:9")
    assert "address: '127.0.0.1:9': no Ray cluster there" in said
    assert not (here / "runs" / "paredown.db").exists()


def test_a_malicious_pickle_runs_nothing(here: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(here / "trapped"),)

    bad = data / "bad.pth"
    for save in (lambda: bad.write_bytes(pickle.dumps(Trap())), lambda: torch.save({"model": Trap()}, bad)):
        save()
        refused(capsys, "search", config(data), "--checkpoint", bad)
        assert not (here / "trapped").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"images": []}', "\x00\x01"])
def test_broken_annotations(
    here: Path, data: Path, tmp_path_factory: pytest.TempPathFactory, content: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    broken = tmp_path_factory.mktemp("broken")
    (broken / "annotations").mkdir()
    (broken / "annotations" / "train.json").write_text(content)
    assert "train.json" in refused(capsys, "search", config(data), "--data", broken)


def test_a_password_is_shown_nowhere(
    here: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"postgresql://me:{SECRET}@127.0.0.1:9/db"
    for arguments in (["front", "--study", "a"], ["dashboard"], ["search", config(data)]):
        assert SECRET not in refused(capsys, *arguments, "--storage", url)
    monkeypatch.setattr(sys, "argv", ["search.py", "c.yaml", "--storage", url])
    assert SECRET not in same_again("search") + of_study("front", "a", url)


def test_the_command_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for program in (["paredown", "search"], ["scripts/search.py"]):
        monkeypatch.setattr(sys, "argv", [*program, "my config.yaml", "--trials=4", "--workers", "2"])
        assert same_again("search").endswith("paredown search 'my config.yaml' --trials=4 --workers 2")
        more = same_again("search", trials=8)
        assert more.endswith("paredown search 'my config.yaml' --workers 2 --trials 8")


def test_a_port_that_is_taken(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from search.storage import open_storage

    open_storage("sqlite:///runs.db")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused(capsys, "dashboard", "--storage", "sqlite:///runs.db", "--port", port)
    assert "try another" in said


def test_a_host_that_is_none(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from search.storage import open_storage

    open_storage("sqlite:///runs.db")
    said = refused(capsys, "dashboard", "--storage", "sqlite:///runs.db", "--host", "no.such.host.invalid")
    assert "--host: 'no.such.host.invalid'" in said


def test_init_writes_a_configuration_that_is_read(
    here: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["init", "--model", "yolox_digits", "--data", str(data / "digits")]
    arguments += ["--checkpoint", str(data / "base.safetensors")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    file = here / "yolox_digits_digits.yaml"
    assert f"search {file.name}" in out
    assert "fit: 4 images" in out
    settings = load_config(file)
    assert (settings.data.fit, settings.data.select, settings.data.report) == ("fit", "select", "report")
    assert settings.space.methods == ("prune", "quantize", "activate", "topk")  # it has SiLU
    assert settings.checkpoint == data / "base.safetensors"
    assert main(["evaluate", str(file), "--split", "select", "--json", "--target", "torch"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 3
    assert "there already" in refused(capsys, *arguments)
    assert main([*arguments[:-2], "--output", "later.yaml"]) == 0
    assert "--checkpoint FILE" in capsys.readouterr().out
    assert "--checkpoint" in refused(capsys, "search", "later.yaml")


def test_init_shares_select_from_train(here: Path, data: Path, tmp_path_factory: Any) -> None:
    root = tmp_path_factory.mktemp("my data")
    (root / "annotations").mkdir()
    (root / "images").symlink_to(data / "digits" / "images")
    for theirs, name in (("fit", "train"), ("report", "val")):
        (root / "annotations" / f"{name}.json").symlink_to(data / "digits" / "annotations" / f"{theirs}.json")
    assert main(["init", "--model", "fasterrcnn_digits", "--data", str(root), "--output", "c.yaml"]) == 0
    settings = load_config(here / "c.yaml", {"checkpoint": "x"})
    assert settings.space.methods == ("prune", "quantize", "activate", "gate", "proposals", "topk")
    assert (settings.data.fit, settings.data.select, settings.data.report) == ("train", None, "val")
    assert settings.data.select_fraction == 0.2


def test_init_takes_a_size_and_the_names_of_annotations(
    here: Path, data: Path, tmp_path_factory: Any
) -> None:
    root = tmp_path_factory.mktemp("others")
    (root / "annotations").mkdir()
    (root / "images").symlink_to(data / "digits" / "images")
    for theirs, name in (("fit", "one"), ("select", "two"), ("report", "valid")):
        (root / "annotations" / f"{name}.json").symlink_to(data / "digits" / "annotations" / f"{theirs}.json")
    arguments = ["init", "--model", "yolox_digits", "--data", str(root), "--output", "c.yaml"]
    names = ["--fit", "one", "--select", "two", "--report", "valid"]
    assert main([*arguments, *names, "--size", "96x128"]) == 0
    settings = load_config(here / "c.yaml", {"checkpoint": "x"})
    assert settings.size == (96, 128)
    assert (settings.data.fit, settings.data.select, settings.data.report) == ("one", "two", "valid")


def test_evaluate_agrees_in_torch_and_in_both_engines(
    here: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trained digits detector, so that there is something to find."""
    weights = ROOT / "scripts" / "configs" / "yolox_digits.safetensors"
    scores = {}
    for target in ("torch", "onnxruntime", "openvino"):
        arguments = ["evaluate", config(data), "--checkpoint", weights, "--target", target, "--json"]
        assert main([str(one) for one in arguments]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["split"].endswith("report.json")
        assert result["latency_ms_p50"] > 0
        assert result["map_large"] is None  # no digit is that large
        scores[target] = result["map"]
    assert scores["torch"] > 40
    assert scores["onnxruntime"] == pytest.approx(scores["torch"], abs=0.2)
    assert scores["openvino"] == pytest.approx(scores["torch"], abs=0.2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--split", "nowhere"], "no such annotations"),
        (["--model", "nowhere.onnx"], "no such file"),
        (["--target", "abacus"], "choose one of"),
        (["--hint", "f64"], "f32 or bf16"),
        (["--hint", "bf16", "--target", "onnxruntime"], "is OpenVINO's, the engine is onnxruntime"),
        (["--trial", "3"], "no such file"),
    ],
)
def test_evaluate_refuses(
    here: Path, data: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert said in refused(capsys, "evaluate", config(data), *options)
