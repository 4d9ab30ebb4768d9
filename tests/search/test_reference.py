"""Going on with a study elsewhere: what may differ, what is measured again, what stays."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from toy_problem import FINGERPRINT, OBJECTIVES, toy_study

from evaluators.bench import Bench
from evaluators.bench_config import LatencyConfig
from evaluators.quiet import QuietSlot
from evaluators.targets.base import Detections
from search.front import FINAL
from search.judge import NEW_REFERENCE
from search.reference import renew_reference
from search.study import SearchStudy, open_study, target_differences
from spaces.errors import InputError

THERE = {**FINGERPRINT, "target": "engine", "target cpu": "old", "target engine": "engine 1"}
HERE = {**THERE, "target cpu": "new"}


class Still:
    def run(self, images: NDArray[np.float32]) -> Detections:
        return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))

    def kernels(self) -> dict[str, str]:
        return {}


def bench_here(folder: Path, fingerprint: dict[str, Any]) -> Any:
    """As much of a bench as the reference needs, with an engine that does nothing."""
    loaded: list[Path] = []

    def prepare(model: Path, threads: int) -> Still:
        loaded.append(model)
        return Still()

    bench = SimpleNamespace(
        fingerprint=lambda: fingerprint,
        slot=QuietSlot(folder / "slot"),
        target=SimpleNamespace(prepare=prepare),
        config=SimpleNamespace(threads=1, latency=LatencyConfig(min_rounds=8, max_rounds=8)),
        timing_inputs=[np.zeros((1, 3, 2, 2), np.float32)],
        base_timing_inputs=[np.zeros((1, 3, 2, 2), np.float32)],
        loaded=loaded,
    )
    bench.timed = partial(Bench.timed, bench)
    return bench


@pytest.fixture
def study(tmp_path: Path) -> SearchStudy:
    """One made on the old machine, with a base of 10 ms."""
    url = f"sqlite:///{tmp_path}/study.db"
    made = open_study("moved", THERE, OBJECTIVES, url=url)
    base = made.artifacts / "base"
    base.mkdir()
    (base / "model.onnx").write_bytes(b"base")
    (base / "reference.json").write_text(json.dumps({"base_ms": 10.0}))
    made.optuna.set_user_attr(FINAL, {"models": {"0": {}}})
    return made


def reopened(study: SearchStudy, fingerprint: dict[str, Any], new_reference: bool) -> SearchStudy:
    url = f"sqlite:///{study.artifacts.parents[1]}/study.db"
    return open_study("moved", fingerprint, OBJECTIVES, url=url, new_reference=new_reference)


def test_only_the_signature_may_differ_and_only_if_asked_for(study: SearchStudy) -> None:
    with pytest.raises(InputError, match=r"target cpu: 'old' -> 'new'.*--new-reference"):
        reopened(study, HERE, new_reference=False)
    assert reopened(study, HERE, new_reference=True).fingerprint == THERE, "nothing was measured yet"
    for key in ("base", "target"):
        with pytest.raises(InputError, match=f"{key}: ") as refused:
            reopened(study, {**HERE, key: "another"}, new_reference=True)
        assert "--new-reference" not in str(refused.value)
    assert target_differences(THERE, HERE) == ["target cpu: 'old' -> 'new'"]


def test_a_new_reference_is_measured_once(study: SearchStudy, tmp_path: Path) -> None:
    bench, said = bench_here(tmp_path, HERE), []
    moved = reopened(study, HERE, new_reference=True)
    assert renew_reference(bench, moved, said.append)
    assert set(bench.loaded) == {study.artifacts / "base" / "model.onnx"}
    stored = moved.optuna.user_attrs
    assert stored[NEW_REFERENCE]["scale"] == pytest.approx(stored[NEW_REFERENCE]["base_ms"] / 10.0)
    assert stored[NEW_REFERENCE]["before"] == THERE
    assert stored[FINAL] == {}, "the front is due to be measured again"
    assert json.loads((study.artifacts / "base" / "reference.json").read_text()) == {"base_ms": 10.0}
    again = reopened(study, HERE, new_reference=False)
    assert again.fingerprint == HERE
    assert not renew_reference(bench, again, said.append)
    assert "reference stays" in said[-1]


def test_without_a_base_there_is_nothing_to_go_on_from(study: SearchStudy, tmp_path: Path) -> None:
    (study.artifacts / "base" / "model.onnx").unlink()
    with pytest.raises(InputError, match="is gone"):
        renew_reference(bench_here(tmp_path, HERE), study, print)
    (study.artifacts / "base" / "reference.json").unlink()
    with pytest.raises(InputError, match="finish its base first"):
        renew_reference(bench_here(tmp_path, HERE), study, print)
    assert study.fingerprint == THERE
    assert toy_study(tmp_path, "unmoved").fingerprint == FINGERPRINT
