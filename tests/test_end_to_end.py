"""One search as a user runs it: killed, resumed, its models scored by the published contract alone."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import pytest
import yaml
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evaluators.datasets.digits import write_digits

ROOT = Path(__file__).resolve().parents[1]
TRIALS = 5
IMAGES = {"fit": 32, "select": 24, "report": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a configuration over a few images of the embedded data."""
    folder = tmp_path_factory.mktemp("user")
    write_digits(folder / "digits", images=IMAGES)
    document = {
        "model": "yolox_digits",
        "checkpoint": str(ROOT / "scripts" / "configs" / "yolox_digits.safetensors"),
        "data": {"root": "digits"},
        "search": {"trials": TRIALS, "workers": 2},
        "finetune": {"epochs": 1, "mirror": False},
        "latency": {"images": 4, "min_rounds": 8, "max_rounds": 24, "time_limit_s": 1.0},
        "calibration_images": 8,
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(document))
    return folder


@contextlib.contextmanager
def started(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A script in a session of its own, all of which is gone afterwards."""
    name, *rest = arguments
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *rest],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def run(folder: Path, *arguments: str) -> str:
    with started(folder, *arguments) as process:
        out, err = process.communicate(timeout=500)
    assert process.returncode == 0, out + err
    return out


def trial_states(folder: Path) -> dict[int, str]:
    """Straight from the database, read-only, whoever is writing."""
    file = folder / "runs" / "paredown.db"
    if not file.exists():
        return {}
    with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
        try:
            return dict(database.execute("SELECT number, state FROM trials").fetchall())
        except sqlite3.OperationalError:
            return {}  # its tables are being made


@pytest.fixture(scope="module")
def searched(folder: Path) -> dict[str, Any]:
    """A search that was killed when its first candidate ran, and then run to its end."""
    with started(folder, "search", "tiny.yaml") as process:
        deadline = time.monotonic() + 400
        while sum(state == "RUNNING" for number, state in trial_states(folder).items() if number) < 1:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, trial_states(folder)
            time.sleep(0.2)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    killed = trial_states(folder)
    out = run(folder, "search", "tiny.yaml")
    return {"killed": killed, "ended": trial_states(folder), "out": out}


@pytest.fixture(scope="module")
def front(folder: Path, searched: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(run(folder, "front", "--study", "tiny", "--json"))
    return rows


@pytest.mark.slow
def test_a_killed_search_loses_no_finished_trial(searched: dict[str, Any]) -> None:
    killed, ended = searched["killed"], searched["ended"]
    assert killed[0] == "COMPLETE"  # the base
    assert "RUNNING" in killed.values()
    finished = [number for number, state in killed.items() if state == "COMPLETE"]
    assert all(ended[number] == "COMPLETE" for number in finished)
    assert "RUNNING" not in ended.values()
    assert sum(state == "COMPLETE" for state in ended.values()) >= TRIALS
    # What was running then went on under its own number.
    assert all(ended[number] == "COMPLETE" for number, state in killed.items() if state == "RUNNING")


@pytest.mark.slow
def test_the_search_ends_with_a_front_and_the_next_commands(folder: Path, searched: dict[str, Any]) -> None:
    out = searched["out"]
    assert f"{TRIALS} trials" in out
    assert "Front of tiny" in out
    for command in ("dashboard", "search tiny.yaml --trials 10", "finish --study tiny --trial"):
        assert command in out
    assert (folder / "runs" / "tiny" / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (folder / "runs" / "tiny" / "front.html").read_text()


@pytest.mark.slow
def test_the_front_is_one(front: list[dict[str, Any]], folder: Path) -> None:
    assert any(not row["is_base"] for row in front)
    for row in front:
        assert row["split"] == str(folder / "digits" / "annotations" / "select.json")
        assert Path(row["artifact"]).stat().st_size / 1e6 == pytest.approx(row["size_mb"], abs=1e-3)
        assert row["ratio_low"] <= row["latency_ratio"] <= row["ratio_high"]
        better = [other for other in front if other["map"] >= row["map"] and other is not row]
        assert all(other["latency_ratio"] > row["latency_ratio"] for other in better)


@pytest.mark.slow
def test_the_exported_files_do_what_the_front_says(front: list[dict[str, Any]]) -> None:
    for row in front:
        assert score(Path(row["artifact"]), Path(row["split"])) == pytest.approx(row["map"], abs=0.1)


@pytest.mark.slow
def test_finish_gives_a_pair_that_stands_alone(front: list[dict[str, Any]], folder: Path) -> None:
    best = max((row for row in front if not row["is_base"]), key=lambda row: row["map"])
    out = run(folder, "finish", "--study", "tiny", "--trial", str(best["number"]), "--output", "taken")
    assert "verified" in out
    assert sorted(file.name for file in (folder / "taken").iterdir()) == ["model.json", "model.onnx"]
    assert score(folder / "taken" / "model.onnx", Path(best["split"])) == pytest.approx(best["map"], abs=0.1)


@pytest.mark.slow
def test_another_base_is_refused(folder: Path, searched: dict[str, Any]) -> None:
    document = yaml.safe_load((folder / "tiny.yaml").read_text())
    (folder / "other.yaml").write_text(yaml.safe_dump({**document, "name": "tiny", "seed": 1}))
    with started(folder, "search", "other.yaml") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 2, out + err
    assert "seed: 0 -> 1" in err
    assert err.count("\n") == 1


# -- what a user of a model writes: model.json, numpy, PIL and an engine, nothing of ours


def score(model: Path, annotations: Path) -> float:
    """COCO AP of an exported pair, 0..100."""
    card = json.loads(model.with_name("model.json").read_text())
    detect = engine(model, card["runtime"])
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        found = []
        for image in truth.dataset["images"]:
            pixels = Image.open(annotations.parents[1] / "images" / image["file_name"]).convert("RGB")
            tensor, scale = prepared(pixels, card["preprocess"])
            for box, confidence, label in zip(*detect(tensor), strict=True):
                x1, y1, x2, y2 = (float(side) / scale for side in box)
                found.append(
                    {
                        "image_id": image["id"],
                        "category_id": int(label),
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "score": float(confidence),
                    }
                )
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * float(evaluation.stats[0])


def prepared(image: Image.Image, preprocess: dict[str, Any]) -> tuple[np.ndarray, float]:
    height, width = preprocess["size"]
    scale = min(height / image.height, width / image.width)
    fitted = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR
    )
    canvas = np.full((height, width, 3), preprocess["pad_value"], np.float32)
    canvas[: fitted.height, : fitted.width] = np.asarray(fitted)
    if preprocess["channel_order"] == "BGR":
        canvas = canvas[:, :, ::-1]
    canvas = (canvas * preprocess["scale"] - preprocess["mean"]) / preprocess["std"]
    return np.ascontiguousarray(canvas.transpose(2, 0, 1)[None], np.float32), scale


def engine(model: Path, runtime: dict[str, Any]) -> Any:
    names = ("boxes", "scores", "labels")
    if runtime["engine"] == "onnxruntime":
        session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
        return lambda images: session.run(list(names), {"images": images})
    compiled = openvino.Core().compile_model(str(model), "CPU", runtime["config"])

    def detect(images: np.ndarray) -> list[np.ndarray]:
        outputs = compiled({"images": images})
        return [outputs[name] for name in names]

    return detect
