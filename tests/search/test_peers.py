"""What users do today, on a small detector: the same decoding, the same choice of input sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluators.bench import Bench
from evaluators.bench_config import BenchConfig, LatencyConfig, SpaceConfig
from evaluators.datasets.base import DataConfig
from evaluators.datasets.digits import write_digits
from evaluators.exported import ModelCard
from evaluators.quiet import QuietSlot
from evaluators.targets.openvino_cpu import OpenVinoSession
from search import peers
from search.comparison import compare
from spaces.errors import InputError

WEIGHTS = Path(__file__).resolve().parents[2] / "scripts" / "configs" / "yolox_digits.safetensors"
pytest.importorskip("nncf", reason="pip install 'paredown[test]'")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    root = write_digits(folder / "digits", images={"fit": 12, "select": 24, "report": 4})
    config = BenchConfig(
        model="yolox_digits",
        checkpoint=WEIGHTS,
        size=(128, 128),
        data=DataConfig(root=root, format="coco"),
        space=SpaceConfig(methods=("prune", "resize")),
        target="openvino",
        latency=LatencyConfig(images=2, min_rounds=8, max_rounds=8, time_limit_s=0.2),
        calibration_images=2,
        cache=folder / "cache",
    )
    return Bench(config, QuietSlot(folder / "slot"))


def test_peers_may_shrink_the_input_where_the_search_may(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "CALIBRATION_IMAGES", 4)
    monkeypatch.setattr(peers, "REDUCED_LOSS", 30.0)
    base = bench.base_model(tmp_path / "base")
    found = {peer.name: peer for peer in peers.openvino_peers(bench, base, tmp_path / "peers")}
    plain = ["OpenVINO f32", "OpenVINO bf16", *(f"nncf{kind}" for kind in ("", " MIXED", " conv only"))]
    assert set(plain) <= set(found)
    sizes = [name.rsplit(", ", 1)[1] for name in found if name.startswith("OpenVINO bf16, ")]
    assert sizes
    smallest = min(sizes, key=lambda shown: int(shown.split("x")[0]) * int(shown.split("x")[1]))
    assert f"nncf conv only, bf16, {smallest}" in found
    chosen = {name: found[name] for name in ("OpenVINO f32", f"nncf conv only, bf16, {smallest}")}
    assert ModelCard.beside(chosen[f"nncf conv only, bf16, {smallest}"].model).preprocess.size != (128, 128)
    models = {name: (OpenVinoSession(peer.model, 1, peer.hint), peer.model) for name, peer in chosen.items()}
    rows = compare(bench, models, "OpenVINO f32", ["select"], lambda line: None)
    full, small = (row.map["select"] for row in rows)
    assert full > 20
    assert full - small < 40, "boxes are in pixels of the originals"


def test_a_size_that_costs_too_much_is_no_peer(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "REDUCED_LOSS", -100.0)
    monkeypatch.setattr(peers, "_quantisers", dict)
    found = peers.openvino_peers(bench, bench.base_model(tmp_path / "base"), tmp_path / "peers")
    assert [peer.name for peer in found] == ["OpenVINO f32", "OpenVINO bf16"]


def test_they_run_in_openvino_alone(bench: Bench, tmp_path: Path) -> None:
    config = bench.config.model_copy(update={"target": "onnxruntime"})
    other = Bench(config, bench.slot)
    with pytest.raises(InputError, match="OpenVINO alone"):
        peers.openvino_peers(other, tmp_path / "model.onnx", tmp_path)
