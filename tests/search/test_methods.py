"""The table of methods: its recipes, that it goes on where it was left, and real rows of a tiny study."""

import json
from pathlib import Path

import pytest

from evaluators.bench import Bench
from evaluators.bench_config import BenchConfig, LatencyConfig
from evaluators.datasets.base import DataConfig
from evaluators.datasets.digits import write_digits
from evaluators.finetune import FineTunePlan
from search.benchmarks.built import built_bench, measure_built, write_built
from search.benchmarks.criteria import CRITERIA, compare_criteria, write_criteria
from search.benchmarks.method_recipes import MEANING, MODERATE, recipe_of
from search.benchmarks.method_table import measure_methods, read_sections
from search.benchmarks.methods import InEngine, MethodBench, Row, Section
from search.benchmarks.rates import compare_rates, write_rates
from search.cli import main
from spaces.apply import apply
from spaces.errors import InputError
from spaces.recipe import Factorize, Prune, Recipe

WEIGHTS = Path(__file__).resolve().parents[2] / "scripts" / "configs" / "yolox_digits.safetensors"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> BenchConfig:
    folder = tmp_path_factory.mktemp("bench")
    root = write_digits(folder / "digits", images={"fit": 10, "select": 4, "report": 4})
    return BenchConfig(
        model="yolox_digits",
        checkpoint=WEIGHTS,
        size=(64, 64),
        data=DataConfig(root=root, format="coco"),
        finetune=FineTunePlan(epochs=1, batch_size=5, mirror=False),
        latency=LatencyConfig(images=2, min_rounds=8, max_rounds=8, time_limit_s=0.2),
        calibration_images=2,
        cache=folder / "cache",
    )


@pytest.fixture(autouse=True)
def _own_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that studies on this machine are not held up."""
    monkeypatch.setattr("evaluators.quiet.default_directory", lambda: tmp_path / "slot")


def test_every_method_has_a_recipe_that_can_be_carried_out(config: BenchConfig) -> None:
    bench = Bench(config)
    assert list(MODERATE) == list(MEANING)
    for method in MODERATE:
        recipe = recipe_of(method, bench)
        if method == "gate":
            assert recipe is None, "it has none"
            continue
        assert recipe is not None
        assert recipe == recipe_of(method, bench), "fixed"
        apply(bench.base, recipe, bench.sites)
    pruned = recipe_of("prune", bench)
    assert pruned is not None
    assert set(pruned.of_kind(Prune)) <= set(bench.sites.channel)
    assert all(0.1 < choice.sparsity < 0.4 for choice in pruned.of_kind(Prune).values())
    both = recipe_of("prune + factorize + int8", bench)
    assert both is not None
    assert {choice.kind for choice in both.choices} == {"prune", "factorize", "quantize"}
    assert all(0.5 <= choice.rank_ratio <= 0.75 for choice in both.of_kind(Factorize).values())


class Counting:
    """Rows out of nothing; the second method fails until it is `mended`."""

    def __init__(self, key: str = "k") -> None:
        self.name, self.key, self.asked, self.mended = "toy", key, list[str](), False

    def recipe(self, method: str) -> Recipe | None:
        return (
            None if method == "drop" else Recipe(detector="toy", choices=(Prune(site=method, sparsity=0.5),))
        )

    def section(self, facts: dict[str, str]) -> Section:
        said = {"name": self.name, "key": self.key, "detector": "toy", "epochs": 1, "base_map": 50.0}
        return Section(**said, base_mb=1.0, facts=facts)

    def row(self, method: str, number: int) -> Row:
        self.asked.append(method)
        recipe = self.recipe(method)
        if recipe is None:
            return Row(method=method, key="", note="nothing here for it")
        if method == "activate" and not self.mended:
            return Row(method=method, key=recipe.key, note="failed: why", failed=True)
        engine = InEngine(
            ratio=0.5,
            low=0.4,
            high=0.6,
            base_ms=10.0,
            stable=True,
            map=45.0,
            size_mb=0.5,
            kernels={"f32": 3},
            fell_back=1,
        )
        difference = (-5.0, -6.0, -4.0)
        return Row(
            method=method,
            key=recipe.key,
            one_shot=40.0,
            tuned=45.0,
            difference=difference,
            engines={"e": engine},
        )


def test_it_goes_on_where_it_was_left(tmp_path: Path) -> None:
    report, methods, facts = tmp_path / "methods.md", ["prune", "activate", "drop"], {"cpu": "this one"}

    def measure(bench: Counting, methods: list[str]) -> list[str]:
        bench.asked.clear()
        measure_methods(report, bench, methods, facts, {"command": "here"}, lambda line: None)  # type: ignore[arg-type]
        return bench.asked

    bench = Counting()
    assert measure(bench, methods[:1]) == ["prune"]
    assert measure(bench, methods) == ["activate", "drop"]
    bench.mended = True
    assert measure(bench, methods) == ["activate"], "what failed is tried again, what has no site is not"
    assert measure(bench, methods) == []
    text = report.read_text()
    assert "| prune | 40.00 | 45.00 | -5.00 [-6.00, -4.00] | 0.500 [0.400, 0.600] | 45.00 | 0.50 |" in text
    assert "| 3 f32; 1 not as chosen |" in text
    assert "| drop | nothing here for it |" in text
    assert [row.method for row in read_sections(report)["toy"].rows] == methods
    assert measure(Counting("another machine"), methods[:1]) == ["prune"], "nothing of another key stays"
    assert [row.method for row in read_sections(report)["toy"].rows] == ["prune"]


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "methods.json").write_text("{}")
    with pytest.raises(InputError, match="no report of methods"):
        read_sections(tmp_path / "methods.md")
    assert read_sections(tmp_path / "elsewhere.md") == {}


def test_an_unknown_method_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "methods", "digits.yaml", "--method", "magic"]) == 2
    error = capsys.readouterr().err
    assert "magic" in error
    assert error.count("\n") == 1


def test_a_trained_and_an_untrained_row_of_a_tiny_detector(config: BenchConfig, tmp_path: Path) -> None:
    bench = MethodBench("tiny", config, tmp_path / "models", lambda line: None)
    report = tmp_path / "methods.md"
    facts = {"cpu": "this one"}
    measure_methods(report, bench, ["quantize int8", "prune"], facts, {"command": "here"}, lambda line: None)
    section = Section.model_validate(json.loads((tmp_path / "methods.json").read_text())["sections"][0])
    pruned, integers = section.rows
    assert (pruned.method, integers.method) == ("prune", "quantize int8")
    assert [pruned.note, integers.note] == ["", ""]
    assert (pruned.tuned is None, integers.tuned is None) == (False, True)
    for row in section.rows:
        assert list(row.engines) == ["openvino", "onnxruntime"]
        final = row.engines["openvino"].map
        assert final == (row.one_shot if row.tuned is None else row.tuned)
        assert row.difference is not None
        assert row.difference[0] == pytest.approx(final - section.base_map)
        assert all(one.size_mb < section.base_mb for one in row.engines.values())
    assert integers.engines["openvino"].kernels.keys() == {"i8"}
    assert pruned.engines["onnxruntime"].kernels.keys() == {"f32"}


def test_criteria_of_importance_side_by_side(config: BenchConfig, tmp_path: Path) -> None:
    base, rows = compare_criteria(Bench(config), (0.25,), tmp_path / "files", lambda line: None)
    assert [row.criterion for row in rows] == list(CRITERIA)
    assert base > 0
    assert len({row.one_shot for row in rows}) > 1, "they prune other channels"
    for row in rows:
        assert row.difference[0] == pytest.approx(row.trained - base)
    write_criteria(tmp_path / "report.md", "Criteria", base, 1, rows, {"command": "here"})
    assert "| 25.0% | batchnorm |" in (tmp_path / "report.md").read_text()


def test_learning_rates_side_by_side(config: BenchConfig, tmp_path: Path) -> None:
    base, rows = compare_rates(Bench(config), (1e-4, 1e-2), tmp_path / "files", lambda line: None, (0.25,))
    trained = {(row.sparsity, row.rate): row.map for row in rows}
    assert list(trained) == [(sparsity, rate) for rate in (1e-4, 1e-2) for sparsity in (0.0, 0.25)]
    assert trained[0.0, 1e-4] != trained[0.0, 1e-2], "the base is trained by each of them"
    assert trained[0.25, 1e-4] != trained[0.25, 1e-2]
    for row in rows:
        assert row.difference[0] == pytest.approx(row.map - base)
    write_rates(tmp_path / "report.md", "Rates", base, 1, rows, {"command": "here"})
    text = (tmp_path / "report.md").read_text()
    assert text.index("| nothing | 0.01 |") < text.index("| 25.0% | 0.0001 |")


def test_a_built_model_is_timed_with_random_weights(config: BenchConfig, tmp_path: Path) -> None:
    bench = built_bench("yolox_digits", config.data, "openvino", 1, 0, tmp_path)
    again = built_bench("yolox_digits", config.data, "openvino", 1, 0, tmp_path / "again")
    assert bench.weights_hash == again.weights_hash
    rows = measure_built(bench, 0.25, 0.5, 8, tmp_path / "models", lambda line: None)
    assert [row.name for row in rows] == ["float32", "pruned by 25%", "ranks of 0.5", "8 bits", "all three"]
    plain, pruned, ranks, integers, every = rows
    assert (plain.macs, integers.macs) == (1.0, 1.0)
    assert every.macs < min(pruned.macs, ranks.macs) < 1.0
    assert every.size_mb < integers.size_mb < plain.size_mb
    assert (set(plain.kernels), set(every.kernels)) == ({"f32"}, {"i8"})
    write_built(tmp_path / "built.md", "yolox_digits", "openvino", rows, {"command": "here"})
    assert "random" in (tmp_path / "built.md").read_text()
    assert len(json.loads((tmp_path / "built.json").read_text())["models"]) == 5
