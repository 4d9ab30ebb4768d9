"""Benchmarks of the measurements: their arithmetic by hand, and each command on a few tiny models."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from evaluators.bench import Bench
from evaluators.bench_config import BenchConfig, LatencyConfig
from evaluators.calibration import QuantizationPlan
from evaluators.datasets.base import DataConfig
from evaluators.datasets.digits import write_digits
from evaluators.finetune import FineTunePlan
from evaluators.latency import PairedLatency, Times
from evaluators.latency_model import fit_latency
from evaluators.quiet import QuietSlot
from evaluators.targets.registry import target_named
from evaluators.targets.roofline import Description, Work, roofline
from search.benchmarks import quietness, scoring, widths
from search.benchmarks.fit_roofline import AllWork, Measured, fit_description, write_description
from search.benchmarks.peaks import Limits, machine_limits
from search.benchmarks.predict import Prediction, figures
from search.benchmarks.quietness import IDLE, NO_SLOT, Model, Timed, compare_conditions, tensor_times
from search.benchmarks.recipes import RANGE, exported, options_of, unseen_recipes
from search.strategy import probe_recipes
from spaces.errors import InputError
from spaces.recipe import identity
from spaces.table import SpaceTable

WEIGHTS = Path(__file__).resolve().parents[2] / "scripts" / "configs" / "yolox_digits.safetensors"


def latency_of(
    ratio: float, width: float = 0.0, seconds: float = 1.0, base_ms: float = 10.0
) -> PairedLatency:
    times = [Times(p50=ms, p90=ms, samples=(ms,)) for ms in (ratio * base_ms, base_ms)]
    return PairedLatency(
        ratio=ratio,
        low=ratio - width,
        high=ratio + width,
        quartiles=(ratio, ratio),
        candidate_ms=times[0],
        base_ms=times[1],
        images=1,
        threads=1,
        affinity=(),
        target_spread=0.02,
        drift=0.0,
        stable=True,
        rejected_batches=0,
        seconds=seconds,
    )


def test_distance_order_and_cost_by_hand() -> None:
    idle = {name: Timed(latency_of(r, seconds=2.0), 2.0) for name, r in (("a", 1.0), ("b", 0.5), ("c", 0.25))}
    noisy = {
        name: Timed(latency_of(r, seconds=3.0), 5.0) for name, r in (("a", 1.1), ("b", 0.5), ("c", 0.55))
    }
    found = quietness.figures({IDLE: idle, NO_SLOT: noisy}, workers=2)
    assert found[IDLE]["median_difference"] == 0.0
    assert found[IDLE]["spearman"] == pytest.approx(1.0)
    assert found[IDLE]["share"] == pytest.approx(4 / 64)  # two measurements of 2 s to a trial of 60 s
    assert found[NO_SLOT]["median_difference"] == pytest.approx(0.1)  # of 0.1, 0 and 1.2
    assert found[NO_SLOT]["largest_difference"] == pytest.approx(1.2)
    assert found[NO_SLOT]["spearman"] == pytest.approx(0.5)
    assert (found[NO_SLOT]["measuring_s"], found[NO_SLOT]["wall_s"]) == (3.0, 5.0)


def test_errors_of_predictions_by_hand() -> None:
    rows = [(1.0, 1.1, 0.5), (0.5, 0.5, 0.6), (0.25, 0.2, 1.0)]
    found = figures(
        [
            Prediction(identity("d"), k == 0, r, latency_of(r), ours, macs, k == 2)
            for k, (r, ours, macs) in enumerate(rows)
        ]
    )
    assert found["median_error"] == pytest.approx(0.1)
    assert found["median_error_macs"] == pytest.approx(0.5)
    assert (found["spearman"], found["spearman_macs"]) == pytest.approx((1.0, -1.0))
    assert (found["range"], found["mixed"], found["extrapolating"]) == pytest.approx((4.0, 1 / 3, 1.0))


def test_a_roofline_is_found_again(tmp_path: Path) -> None:
    truth = Description(
        name="truth",
        peak_gmacs={32: 20.0, 8: 60.0},
        bandwidth_gbs=8.0,
        depthwise_share=0.3,
        elementwise_gops=5.0,
        layer_us=3.0,
        fixed_ms=0.5,
    )
    random = np.random.default_rng(0)

    def recipe(share: float) -> list[Work]:
        works = []
        for k in range(20):
            width = 8 if random.random() < share else 32
            size = random.random()
            thin = k % 4 == 3
            works.append(Work(size * (1e6 if thin else 3e7), size * 4e5, 0.0, width, depthwise=thin))
            works.append(Work(0.0, 0.0, size * 1e5, width))
        return works

    def measured(share: float) -> Measured:
        works = recipe(share)
        return Measured(identity("d"), works, latency_of(roofline(truth, works).ms / 10.0))

    recipes = [measured(share) for share in np.linspace(0, 1, 24)]
    limits = Limits({32: 40.0, 8: 240.0}, bandwidth_gbs=30.0)
    found = fit_description("found", recipes, 8, limits)
    unseen = [recipe(share) for share in (0.1, 0.5, 0.9)]
    one_by_one = [roofline(found, works).ms for works in unseen]
    assert AllWork(unseen).milliseconds(found) == pytest.approx(one_by_one)
    for works in unseen:
        assert roofline(found, works).ms == pytest.approx(roofline(truth, works).ms, rel=0.03)
    assert found.peak_gmacs == limits.peak_gmacs
    assert found.bandwidth_gbs <= limits.bandwidth_gbs
    assert found.reached(8, depthwise=False) > 1.5 * found.reached(32, depthwise=False)
    write_description(tmp_path / "found.yaml", found, {"command": "here"})
    from evaluators.targets.roofline import read_description

    again = read_description(tmp_path / "found.yaml")
    for works in unseen:
        assert roofline(again, works).ms == pytest.approx(roofline(found, works).ms, rel=0.01)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    root = write_digits(folder / "digits", images={"fit": 10, "select": 6, "report": 1})
    config = BenchConfig(
        model="yolox_digits",
        checkpoint=WEIGHTS,
        size=(64, 64),
        data=DataConfig(root=root, format="coco"),
        finetune=FineTunePlan(epochs=1, batch_size=5, mirror=False),
        latency=LatencyConfig(images=2, min_rounds=8, max_rounds=8, time_limit_s=0.2),
        calibration_images=2,
        cache=folder / "cache",
    )
    return Bench(config, QuietSlot(folder / "slot"))


def test_peaks_are_of_every_native_width(bench: Bench) -> None:
    limits = machine_limits(bench)
    assert set(limits.peak_gmacs) == set(bench.capabilities.bit_widths)
    macs = 4 * (256 * 3 * 28) ** 2 / 1e9
    assert all(macs < peak < 1000 * macs for peak in limits.peak_gmacs.values()), "between 1 ms and 1 s"
    assert limits.bandwidth_gbs > 1
    other = copy.copy(bench)
    other.target = target_named("torch")
    with pytest.raises(InputError, match="ONNX"):
        machine_limits(other)


def test_unseen_recipes_are_new_and_spread(bench: Bench) -> None:
    space = SpaceTable(bench.space)
    seen = probe_recipes(space, 24, 0)
    options = options_of(space, seen)
    macs = space.shapes(options).macs.sum(1) / space.base.macs.sum()
    model = fit_latency(space, options, 0.1 + 0.9 * macs)
    found = unseen_recipes(space, model, 12, 1, seen)
    assert len({recipe.key for recipe in found} - {recipe.key for recipe in seen}) == 12
    chosen = options_of(space, found)
    mixed = [len(set(row)) > 1 for row in space.shapes(chosen).bits.tolist()]
    assert sum(mixed) == 6
    predicted = np.sort(model.predict(chosen))
    assert 0.6 * RANGE < predicted[-1] / predicted[0] <= 1.3 * RANGE
    assert np.diff(np.log(predicted)).max() < np.log(RANGE) / 3


def test_scoring_is_profiled_stage_by_stage(bench: Bench, tmp_path: Path) -> None:
    found = scoring.profile_of(bench, bench.split("select"), tmp_path / "base", lambda line: None)
    assert found.images == 6
    assert list(found.stages) == ["decode", "letterbox", "input", "engine", "output"]
    assert min(found.stages.values()) > 0
    assert found.around == pytest.approx(sum(found.stages.values()) / found.stages["engine"])
    assert found.parity.holds
    scoring.write_profile(tmp_path / "report.md", "Scoring", found, {"command": "here"})
    assert json.loads((tmp_path / "report.json").read_text())["facts"] == {"command": "here"}
    assert "| everything / engine |" in (tmp_path / "report.md").read_text()


def test_models_are_timed_idle_and_beside_training(bench: Bench, tmp_path: Path) -> None:
    base = exported(bench, bench.identity, tmp_path / "base")
    models = []
    for k, recipe in enumerate(probe_recipes(SpaceTable(bench.space), 2, 0)):
        one = exported(bench, recipe, tmp_path / str(k))
        models.append(Model(str(k), one.session, bench.target.prepare_tensor_part(one.file, 1)))
    results = compare_conditions(bench, models, base.session, 1, tmp_path / "slot", lambda line: None)
    assert [list(rows) for rows in results.values()] == [["0", "1"]] * 3
    assert all(one.wall_s >= one.latency.seconds for rows in results.values() for one in rows.values())
    tensors = tensor_times(bench, models, base.session)
    quietness.write_quietness(tmp_path / "report.md", "Latency", results, tensors, 1, {"command": "here"})
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["tensor_ms"].keys() == {"0", "1"}
    assert list(content["conditions"]) == list(results)


def test_every_width_has_every_way_of_finding_ranges(bench: Bench) -> None:
    names = [variant.name for variant in widths.variants(bench)]
    wide = [f"{bits} bits" for bits in bench.capabilities.bit_widths if bits > 8]
    books = [f"codebooks of {entries}" for entries in (256, 64, 16)]
    assert names == [*wide, *["8 bits"] * 6, *["6 bits"] * 3, *["4 bits"] * 3, *books]
    eight = [variant for variant in widths.variants(bench) if variant.name == "8 bits"]
    assert eight[0].plan == bench.config.quantization
    assert len({variant.plan.model_dump_json() for variant in eight if variant.plan}) == 6
    trained = [variant.name for variant in widths.variants(bench, trained=True) if variant.trained]
    assert trained == ["8 bits", "6 bits", "4 bits"]
    sites = set(bench.sites.layer)
    assert all({choice.site for choice in variant.recipe.choices} == sites for variant in eight)


def test_costs_of_widths(bench: Bench, tmp_path: Path) -> None:
    everything = {variant.name: variant for variant in reversed(widths.variants(bench))}
    chosen = [everything[name] for name in ("32 bits", "8 bits", "4 bits", "codebooks of 16")]
    chosen += [v for v in widths.variants(bench, trained=True) if v.trained and v.name == "4 bits"]
    found = widths.costs(bench, chosen, bench.split("select"), tmp_path / "files", False, lambda line: None)
    base, eight, four, book, trained = found
    layers = len(bench.sites.facts)
    assert base.difference == (0.0, 0.0, 0.0)
    assert [cost.kernels for cost in found] == [{kind: layers} for kind in ("f32", "i8", "i8", "f32", "i8")]
    assert [cost.fell_back for cost in found] == [{}] * 5
    assert trained.size_mb == pytest.approx(four.size_mb, rel=0.02)
    assert base.stored == {"32 bits, ran as f32": layers}
    assert eight.stored == {"8 bits, ran as i8": layers}
    assert four.stored["4 bits, ran as i8"] + four.stored.get("8 bits, ran as i8", 0) == layers
    assert base.size_mb > book.size_mb
    assert base.size_mb > eight.size_mb > four.size_mb
    assert bench.config.quantization == QuantizationPlan(), "variants must leave the bench as it is"
    widths.write_costs(tmp_path / "report.md", "Widths", found, "select", {"command": "here"})
    content = json.loads((tmp_path / "report.json").read_text())
    assert [row["layers"] for row in content["rows"]] == [cost.variant.name for cost in found]
    assert [row["kernels"] for row in content["rows"]] == [cost.kernels for cost in found]
    assert [row["trained"] for row in content["rows"]] == [False, False, False, False, True]
    text = (tmp_path / "report.md").read_text()
    assert (
        f"All layers in int8, ranges and biases as configured: {eight.map:.2f} AP of {base.map:.2f}" in text
    )
    assert "Layers that ran in another type than asked for: none." in text
