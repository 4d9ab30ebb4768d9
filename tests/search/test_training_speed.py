"""The plain loop takes the steps of ours, and the report of both."""

import copy
import json
from pathlib import Path

import pytest
import torch

from evaluators.bench import Bench
from evaluators.bench_config import BenchConfig
from evaluators.datasets.base import DataConfig
from evaluators.datasets.digits import write_digits
from evaluators.finetune import FineTunePlan, fine_tune
from evaluators.quiet import QuietSlot
from search.benchmarks.method_recipes import recipe_of
from search.benchmarks.plain_loop import plain_fine_tune
from search.benchmarks.training_speed import PLAIN, compare_training, recipes_of, ways_of, write_training
from spaces.apply import apply
from spaces.recipe import Prune

WEIGHTS = Path(__file__).resolve().parents[2] / "scripts" / "configs" / "yolox_digits.safetensors"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    root = write_digits(folder / "digits", images={"fit": 11, "select": 2, "report": 4})
    config = BenchConfig(
        model="yolox_digits",
        checkpoint=WEIGHTS,
        size=(64, 64),
        data=DataConfig(root=root, format="coco"),
        finetune=FineTunePlan(epochs=2, batch_size=5),
        calibration_images=2,
        cache=folder / "cache",
    )
    return Bench(config, QuietSlot(folder / "slot"))


def test_the_plain_loop_ends_where_ours_does(bench: Bench) -> None:
    """In float32 they differ by rounding and by the teacher's outputs, which ours keeps in half precision."""
    recipe = recipe_of("prune", bench)
    assert recipe is not None
    plain = apply(bench.base, recipe, bench.sites).network.requires_grad_(True)
    ours, start = copy.deepcopy(plain), copy.deepcopy(plain)
    plan = bench.config.finetune.model_copy(update={"precision": "float32"})
    theirs = list(plain_fine_tune(plain, bench, plan, 3))
    run = fine_tune(ours, bench.detector, bench.fit, bench.teacher, plan, bench.slot, 3)
    for a, b in zip(theirs, run, strict=True):
        assert (a.number, a.loss) == (b.number, pytest.approx(b.loss, rel=0.01))
    moved = distance = 0.0
    for a, b, before in zip(plain.parameters(), ours.parameters(), start.parameters(), strict=True):
        moved += float((a - before).square().sum())
        distance += float((a - b).square().sum())
    assert distance < 0.02 * moved


def test_behind_half_of_the_multiplications_the_front_is_untouched(bench: Bench) -> None:
    found = recipes_of(bench)
    assert list(found) == ["everywhere", "behind"]
    late, every = set(found["behind"].of_kind(Prune)), set(found["everywhere"].of_kind(Prune))
    assert late < every
    assert not any(site.startswith(("backbone.backbone.stem", "backbone.backbone.dark2")) for site in late)


def test_every_way_is_compared(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluators.finetune.machine_signature", lambda: {"isa": []})
    assert list(ways_of(bench.config.finetune)) == ["ours, float32", "ours, float32, frozen prefix"]
    threads = torch.get_num_threads()
    rows = compare_training(bench, range(1), tmp_path / "model", lambda line: None)
    assert torch.get_num_threads() == threads
    assert [(row.recipe, row.way) for row in rows] == [
        ("everywhere", PLAIN),
        ("everywhere", "ours, float32"),
        ("behind", PLAIN),
        ("behind", "ours, float32"),
        ("behind", "ours, float32, frozen prefix"),
    ]
    assert all(row.images == 20 and row.seconds > 0 for row in rows)  # two epochs of two batches of five
    assert all(row.difference == (0.0, 0.0, 0.0) for row in rows if row.way == PLAIN)
    write_training(tmp_path / "report.md", "Speed", 50.0, 2, rows, {"threads": 1})
    assert len(json.loads((tmp_path / "report.json").read_text())["runs"]) == 5
    assert "| everywhere | plain loop | 0 |" in (tmp_path / "report.md").read_text()
