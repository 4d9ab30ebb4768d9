"""Conversion of PyTorch files: what runs, where it runs, and what is refused."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from search.cli import main
from spaces.detectors.conversion import convert
from spaces.errors import InputError


class _Malice:
    """Makes a folder where it is unpickled, and one at a place of its own, and gives back a state."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        code = (
            f"__import__('os').makedirs({str(self.victim)!r}, exist_ok=True) or "
            "open('beside', 'w').close() or "
            "{'home': __import__('torch').tensor([len(__import__('os').environ.get('PAREDOWN_SECRET', ''))])}"
        )
        return eval, (code,)


@pytest.fixture
def malicious(tmp_path: Path) -> tuple[Path, Path]:
    """A pickle and the folder that it makes once it runs."""
    file, victim = tmp_path / "bad.pt", tmp_path / "was-here"
    torch.save({"model": _Malice(victim)}, file)
    return file, victim


def test_tensors_are_converted_without_trust(tmp_path: Path) -> None:
    state = {"a.weight": torch.arange(6.0).reshape(2, 3).T, "a.steps": torch.tensor(7)}
    torch.save({"ema": state, "epoch": 3}, tmp_path / "w.pt")
    assert convert(tmp_path / "w.pt", tmp_path / "w.safetensors") == 2
    written = load_file(tmp_path / "w.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)


def test_a_pickle_runs_nothing_without_trust(
    malicious: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, victim = malicious
    plain = tmp_path / "plain.pt"
    plain.write_bytes(pickle.dumps(_Malice(victim)))
    for source in (file, plain):
        assert main(["convert", str(source), "--output", str(tmp_path / "o.safetensors")]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert len(said.err.splitlines()) == 1
        assert "--trust" in said.err
    assert not victim.exists()
    assert not (tmp_path / "o.safetensors").exists()


def test_trust_runs_it_elsewhere_without_the_environment(
    malicious: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, victim = malicious
    monkeypatch.setenv("PAREDOWN_SECRET", "12345")
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(file), "--trust"]) == 0
    said = capsys.readouterr()
    assert "with your rights" in said.err
    assert "bad.safetensors: 1 tensors" in said.out
    assert victim.exists(), "the test's pickle is harmless, so it shows nothing"
    assert not Path("beside").exists()
    assert load_file(tmp_path / "bad.safetensors")["home"].tolist() == [0]


class Unknown(nn.Linear):
    """A module that no other process can import."""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"model": [1, 2]}, "no state_dict"),
        ({"model": Unknown(1, 1)}, "needs the module tests"),
    ],
)
def test_what_holds_no_network_is_refused(tmp_path: Path, content: object, reason: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match=reason) as caught:
        convert(tmp_path / "w.pt", tmp_path / "w.safetensors", trust=True)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["w.pt"]


def test_whole_networks_are_converted(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    torch.save({"ema": None, "model": network.half()}, tmp_path / "w.pt")
    convert(tmp_path / "w.pt", tmp_path / "w.safetensors", trust=True)
    written = load_file(tmp_path / "w.safetensors")
    assert written.keys() == network.state_dict().keys()
    assert torch.equal(written["0.weight"], network[0].weight)


def test_a_process_that_dies_is_said(tmp_path: Path) -> None:
    class Dying:
        def __reduce__(self) -> tuple[object, ...]:
            return os._exit, (7,)

    torch.save(Dying(), tmp_path / "w.pt")
    with pytest.raises(InputError, match="ended with 7"):
        convert(tmp_path / "w.pt", tmp_path / "w.safetensors", trust=True)


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("none.pt", "o.safetensors", "no such file"),
        ("damaged.pt", "o.safetensors", "damaged"),
        ("damaged.pt", "o.pt", "must end in"),
        ("damaged.pt", "there.safetensors", "is there already"),
    ],
)
def test_other_refusals(tmp_path: Path, source: str, target: str, reason: str) -> None:
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 cut short")
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    with pytest.raises(InputError, match=reason):
        convert(tmp_path / source, tmp_path / target, trust=True)
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"


def test_nothing_of_ours_imports_ultralytics_unasked() -> None:
    """Every module, the registry's names and a detector that is made but not built."""
    code = """
import importlib, pkgutil, sys
import evaluators, search, spaces
for package in (evaluators, search, spaces):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(found.name)
from spaces.detectors.registry import make_detector
make_detector("yolov8n", 3)
sys.exit(any(name.split(".")[0] in ("ultralytics", "cv2") for name in sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
