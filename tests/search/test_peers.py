"""What users do today, on a small detector: the same decoding, the same choice of input sizes."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import pytest

from evaluators.bench import Bench
from evaluators.bench_config import BenchConfig, LatencyConfig, SpaceConfig
from evaluators.datasets.base import DataConfig
from evaluators.datasets.digits import write_digits
from evaluators.exported import ModelCard
from evaluators.finetune import FineTunePlan
from evaluators.quiet import QuietSlot
from evaluators.targets.openvino_cpu import engine
from search.comparison import Compared, compare, fastest, write_report
from search.peers import all_peers, nncf_peers, onnxruntime_peers, openvino_peers, pruning_peers, reduced
from search.peers.all_peers import peers_of
from search.peers.models import PeerModel
from spaces.errors import InputError
from spaces.methods import topk
from spaces.recipe import Proposals, Recipe

WEIGHTS = Path(__file__).resolve().parents[2] / "scripts" / "configs" / "yolox_digits.safetensors"
pytest.importorskip("nncf", reason="pip install -e '.[test]'")


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
        finetune=FineTunePlan(epochs=1, batch_size=4, mirror=False),
        calibration_images=2,
        cache=folder / "cache",
    )
    return Bench(config, QuietSlot(folder / "slot"))


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in (nncf_peers, onnxruntime_peers):
        monkeypatch.setattr(package, "CALIBRATION_IMAGES", 4)


def test_all_peers_find_what_the_base_finds(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning_peers, "RATIOS", (0.5,))
    monkeypatch.setattr(reduced, "REDUCED_LOSS", 30.0)
    base = bench.base_model(tmp_path / "base")
    peers = peers_of(bench, base, tmp_path / "peers", say=lambda line: None)
    found, first = peers.models, next(iter(peers.models))
    assert first == "OpenVINO f32"
    optional = {"Olive": "olive", "Sony MCT": "model_compression_toolkit"}
    assert set(peers.left_out) == {name for name, package in optional.items() if find_spec(package) is None}
    assert {
        "OpenVINO bf16",
        "nncf MIXED, bf16",
        "nncf accuracy control, bf16",
        "torch-pruning 50%, bf16",
        "torch-pruning 50%, int8 + bf16",
        "ONNX Runtime QDQ",
        "ONNX Runtime QDQ, conv only",
    } <= set(found)
    sizes = [name.rsplit(", ", 1)[1] for name in found if name.startswith("OpenVINO bf16, ")]
    smallest = min(sizes, key=lambda shown: math.prod(map(int, shown.split("x"))))
    small = f"nncf conv only, bf16, {smallest}"
    shrunk = found[small]
    assert "x".join(map(str, ModelCard.beside(shrunk[1]).preprocess.size)) == smallest != "128x128"
    assert found["torch-pruning 50%, bf16"][1].stat().st_size < 0.7 * base.stat().st_size
    names = (first, "torch-pruning 50%, int8 + bf16", "ONNX Runtime QDQ, conv only", small)
    rows = compare(bench, {name: found[name] for name in names}, first, ["select"], lambda line: None)
    assert [len(row.times_ms) for row in rows] == [len(rows[0].times_ms)] * len(rows), "round by round"
    assert len(rows[0].times_ms) >= 8
    assert {row.recipe for row in rows} == {None}, "peers have none"
    ap = {row.name: row.map["select"] for row in rows}
    assert ap[first] > 20
    assert min(ap["ONNX Runtime QDQ, conv only"], ap[small]) > 5, "in pixels of the originals"
    again = peers_of(bench, base, tmp_path / "peers", say=lambda line: None)
    assert list(again.models) == list(found)


def test_peers_that_fail_are_left_out_with_a_reason(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")

    def fails(*_: object) -> list[PeerModel]:
        raise ValueError("cannot trace it\nand more")

    base = bench.base_model(tmp_path / "base")
    found = [PeerModel("OpenVINO f32", base), PeerModel("broken", broken)]
    monkeypatch.setattr(all_peers, "openvino_peers", lambda *_: found)
    monkeypatch.setattr(all_peers, "pruned_peers", fails)
    others = ("accuracy_controlled", "onnxruntime_peers", "olive_peers", "mct_peers", "quantised_at_sizes")
    for name in others:
        monkeypatch.setattr(all_peers, name, lambda *_: [])
    lines: list[str] = []
    peers = peers_of(bench, base, tmp_path / "peers", say=lines.append)
    assert list(peers.models) == ["OpenVINO f32"]
    assert list(peers.left_out) == ["broken", "torch-pruning, trained as candidates are"]
    assert peers.left_out["torch-pruning, trained as candidates are"] == "ValueError: cannot trace it"
    assert lines[-1].startswith("left out: torch-pruning")


def test_a_size_that_costs_too_much_is_no_peer(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduced, "REDUCED_LOSS", -100.0)
    base = bench.base_model(tmp_path / "base")
    assert reduced.reduced_inputs(bench, base, tmp_path / "peers", "bf16") == {}
    found = openvino_peers.openvino_peers(base, {})
    assert [peer.name for peer in found] == ["OpenVINO f32", "OpenVINO bf16"]


def test_fewer_boxes_are_a_peer_where_the_search_may_choose_them(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fewest at which the base loses no more than it may."""
    other = Bench(bench.config.model_copy(update={"space": SpaceConfig(methods=("topk",))}), bench.slot)
    base = other.base_model(tmp_path / "base")
    monkeypatch.setattr(topk, "COUNTS", (9, 6, 3))
    found = {}
    for loss in (-100.0, 100.0):
        monkeypatch.setattr(reduced, "REDUCED_LOSS", loss)
        found[loss] = reduced.reduced_inputs(other, base, tmp_path / "peers", "f32")
    assert found[-100.0] == {}
    [(shown, (_, file))] = found[100.0].items()
    assert shown == "top-k 3"
    assert ModelCard.beside(file).postprocess.pre_nms_topk == 3
    names = [peer.name for peer in openvino_peers.openvino_peers(base, found[100.0])]
    assert names == ["OpenVINO f32", "OpenVINO bf16", "OpenVINO bf16, top-k 3"]


def test_of_as_few_boxes_the_smallest_has_the_fewest_proposals(bench: Bench, tmp_path: Path) -> None:
    card = ModelCard.beside(bench.base_model(tmp_path / "base"))
    found: reduced.Reduced = {}
    for shown, count, shares in (("boxes", 50, ()), ("boxes, regions", 50, (0.5,)), ("regions", 60, (0.25,))):
        choices = tuple(Proposals(site="proposals", share=share) for share in shares)
        postprocess = card.postprocess.model_copy(update={"pre_nms_topk": count})
        recipe = Recipe(detector=card.recipe.detector, choices=choices)
        (tmp_path / shown).mkdir()
        card.model_copy(update={"recipe": recipe, "postprocess": postprocess}).write(tmp_path / shown)
        found[shown] = bench, tmp_path / shown / "model.onnx"
    made = reduced.with_smallest(
        lambda _, file, __: [PeerModel("it", file)], bench, tmp_path, tmp_path, found
    )
    assert made == [PeerModel("it", tmp_path), PeerModel("it, boxes, regions", found["boxes, regions"][1])]


def test_accuracy_control_sees_select(bench: Bench, tmp_path: Path) -> None:
    """What NNCF maximises is the AP of `score_session` on the same images."""
    model = bench.base_model(tmp_path / "base")
    compiled = engine().compile_model(str(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    session = bench.target.prepare(model, 1)
    figures, _ = bench.scored(session)
    assert nncf_peers._average_precision(bench, compiled) == pytest.approx(figures["map"])


def test_peers_of_onnx_runtime_are_its_own(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduced, "REDUCED_LOSS", 30.0)
    config = bench.config.model_copy(update={"target": "onnxruntime"})
    other = Bench(config, bench.slot)
    base = other.base_model(tmp_path / "base")
    found = peers_of(other, base, tmp_path / "peers", say=lambda line: None)
    names = list(found.models)
    assert names[:3] == ["ONNX Runtime f32", "ONNX Runtime QDQ", "ONNX Runtime QDQ, conv only"]
    plain = "ONNX Runtime f32, "
    sizes = [name.removeprefix(plain) for name in names if name.startswith(plain)]
    small = min(sizes, key=lambda shown: math.prod(map(int, shown.split("x"))))
    assert f"ONNX Runtime QDQ, conv only, {small}" in names
    torch_bench = Bench(bench.config.model_copy(update={"target": "torch"}), bench.slot)
    with pytest.raises(InputError, match="have peers"):
        peers_of(torch_bench, tmp_path / "model.pt2", tmp_path)


def test_front_and_peers_are_judged_by_the_same_rule(tmp_path: Path) -> None:
    """What was chosen without looking at report is shown beside, with what it really loses there."""

    def row(name: str, lost: float, ratio: float) -> Compared:
        return Compared(name, 1.0, {"report": 60.0 - lost}, {}, {"report": (-lost, -9.0, 9.0)}, (ratio,) * 3)

    rows = [row("base", 0.0, 1.0), row("a", 0.9, 0.8), row("b", 1.1, 0.5)]
    rows += [row("trial 3", 0.0, 0.6), row("trial 4", 1.0, 0.4), row("trial 5", 2.0, 0.3)]
    for peer, name in ((True, "a"), (False, "trial 4")):
        found = fastest(rows, "report", peer=peer)
        assert found is not None
        assert found.name == name
    base = fastest([rows[0], rows[2]], "report", peer=True)
    assert base is rows[0]
    assert fastest([*rows[:3], rows[5]], "report", peer=False) is None
    write_report(tmp_path / "peers.md", "Peers", rows, 5, {"date": "today"})
    text = (tmp_path / "peers.md").read_text()
    assert "| fastest peer | a | -0.90 [-9.00, +9.00] | 0.800 [0.800, 0.800] | 1.00x |" in text
    assert "| fastest of the front | trial 4 | -1.00 [-9.00, +9.00] | 0.400 [0.400, 0.400] | 2.00x |" in text
    assert "takes | trial 5 | -2.00 [-9.00, +9.00] | 0.300 [0.300, 0.300] | 2.67x |" in text
    assert "| b | 58.90 | -1.10 [-9.00, +9.00] | 0.500 [0.500, 0.500] | 1.60x | 1.00 |" in text
    write_report(tmp_path / "none.md", "Peers", [*rows[:3], rows[5]], None, {})
    text = (tmp_path / "none.md").read_text()
    assert "| fastest of the front | none |" in text
    assert "takes | none |" in text
