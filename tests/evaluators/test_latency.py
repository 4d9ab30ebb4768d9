"""The paired protocol under a clock that we turn by hand."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from evaluators import latency
from evaluators.latency import PairedLatency, same_speed
from evaluators.targets.base import Detections
from evaluators.timing_statistics import balanced_orders, base_drift, median_interval
from spaces.errors import InputError

measure_pair = partial(latency.measure_pair, settling=0)
measure_many = partial(latency.measure_many, settling=0)
"""Every run is timed but for the warm-up, so that the tests below can count them."""


class Bench:
    """A clock, and models that move it on as they run and note who ran on which image."""

    def __init__(self, images: int = 1) -> None:
        self.now = 0.0
        self.runs: list[tuple[str, int]] = []
        self.images = [np.full((1, 3, 2, 2), i, dtype=np.float32) for i in range(images)]

    def clock(self) -> float:
        return self.now

    def model(self, name: str, ms: Callable[[int, int], float]) -> Model:
        """`ms(run, image)` is the time of this model's run number `run`, warm-up included."""
        return Model(self, name, ms)


class Model:
    def __init__(self, bench: Bench, name: str, ms: Callable[[int, int], float]) -> None:
        self.bench, self.name, self.ms, self.done = bench, name, ms, 0

    def run(self, images: NDArray[np.float32]) -> Detections:
        image = int(images[0, 0, 0, 0])
        self.bench.runs.append((self.name, image))
        self.bench.now += self.ms(self.done, image) / 1e3
        self.done += 1
        return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))

    def kernels(self) -> dict[str, str]:
        return {}


def test_alternates_and_takes_the_median_of_the_paired_ratios() -> None:
    bench = Bench()
    base = bench.model("base", lambda run, image: [10, 20, 10, 20, 10, 20][run])
    candidate = bench.model("candidate", lambda run, image: [5, 12, 6, 8, 7, 9][run])
    got = measure_pair(
        candidate, base, bench.images, threads=1, min_rounds=6, max_rounds=6, warmup=0, clock=bench.clock
    )
    # Ratios .5 .6 .6 .4 .7 .45, sorted .4 .45 .5 .6 .6 .7: median .55, quartiles .4625 and .6;
    # with six samples the 95 % interval of the median is all of them.
    assert got.ratio == pytest.approx(0.55)
    assert (got.low, got.high) == pytest.approx((0.4, 0.7))
    assert got.quartiles == pytest.approx((0.4625, 0.6))
    assert got.spread == pytest.approx(0.3 / 0.55)
    assert got.base_ms.samples == (10, 20, 10, 20, 10, 20)
    assert got.candidate_ms.samples == (5, 12, 6, 8, 7, 9)
    assert (got.base_ms.p50, got.base_ms.p90) == (15, 20)
    assert (got.candidate_ms.p50, got.candidate_ms.p90) == (7.5, 10.5)
    assert got.rounds == 6
    assert got.seconds == pytest.approx(0.137)
    names = [name for name, _ in bench.runs]
    assert names == ["base", "candidate", "candidate", "base"] * 3


def test_stops_as_soon_as_the_interval_is_narrow() -> None:
    bench = Bench()
    base = bench.model("base", lambda run, image: 10)
    # One outlier: until round 8 the interval is the whole range (k = 1), from round 9 the second smallest
    # and largest count (k = 2) and the outlier drops out.
    candidate = bench.model("candidate", lambda run, image: 9 if run == 2 else 5)
    got = measure_pair(candidate, base, bench.images, threads=1, min_rounds=6, warmup=0, clock=bench.clock)
    assert got.rounds == 9
    assert (got.ratio, got.low, got.high, got.spread) == (0.5, 0.5, 0.5, 0.0)


@pytest.mark.parametrize(("limit", "rounds"), [(0.0, 6), (0.150, 8), (1.0, 20)])
def test_time_and_rounds_are_limited(limit: float, rounds: int) -> None:
    bench = Bench()
    base = bench.model("base", lambda run, image: 10)
    noisy = bench.model("noisy", lambda run, image: 5 + 10 * (run % 2))  # 20 ms a round on average
    got = measure_pair(
        *(noisy, base, bench.images),
        threads=1,
        min_rounds=6,
        max_rounds=20,
        time_limit_s=limit,
        warmup=0,
        clock=bench.clock,
    )
    assert got.rounds == rounds
    assert got.spread > got.target_spread


def test_common_drift_cancels_in_the_ratio_and_is_rejected() -> None:
    bench = Bench()

    def slowing(run: int) -> float:
        """The machine is 40 % slower from the thirteenth round on, in the first batch only."""
        return 14 if 12 <= run < 24 else 10

    base = bench.model("base", lambda run, image: slowing(run))
    candidate = bench.model("candidate", lambda run, image: slowing(run) / 2)
    options: dict[str, Any] = {
        "threads": 1,
        "min_rounds": 24,
        "max_rounds": 24,
        "warmup": 0,
        "clock": bench.clock,
    }
    got = measure_pair(candidate, base, bench.images, **options)
    assert (got.ratio, got.stable, got.rejected_batches, got.drift) == (0.5, True, 1, 0.0)
    assert len(bench.runs) == 2 * 48
    assert got.seconds == pytest.approx(1.5 * (12 * 10 + 12 * 14 + 24 * 10) / 1e3)

    # Drift in every batch, least in the second: that one is returned, marked.
    drifts = [14, 12, 13]
    base.done = 0
    base.ms = lambda run, image: drifts[run // 24] if run % 24 >= 12 else 10
    got = measure_pair(candidate, base, bench.images, **options)
    assert (got.stable, got.rejected_batches) == (False, 2)
    assert got.drift == pytest.approx(0.2)
    assert max(got.base_ms.samples) == 12


def test_drift_is_seen_per_image() -> None:
    heavy_last = [10.0] * 6 + [30.0] * 3  # image 1 takes three times as long, no drift
    assert base_drift([10, 30] * 9, images=2) == 0.0
    assert base_drift(heavy_last, images=1) == pytest.approx(2.0)
    assert base_drift([30, 10] * 3 + [15, 5] * 3, images=2) == pytest.approx(1.0)  # twice as fast
    assert base_drift([10, 11, 12, 13, 14, 15], images=6) == pytest.approx(14.5 / 10.5 - 1)


def test_a_timed_run_follows_runs_of_the_same_model_on_the_same_image() -> None:
    """The first of three runs takes 9 ms, the others 2 and 1: what counts is the last one."""
    bench = Bench(images=2)
    slow_behind_others = [bench.model(name, lambda run, image: (9.0, 2.0, 1.0)[run % 3]) for name in "cb"]
    got = latency.measure_pair(
        *slow_behind_others,
        bench.images,
        threads=1,
        min_rounds=6,
        max_rounds=6,
        warmup=0,
        settling=2,
        clock=bench.clock,
    )
    assert got.candidate_ms.samples == got.base_ms.samples == (1.0,) * 6
    turns = [bench.runs[k : k + 3] for k in range(0, len(bench.runs), 3)]
    assert all(len(set(turn)) == 1 for turn in turns)
    assert Counter(turn[0] for turn in turns) == {(name, image): 3 for name in "cb" for image in (0, 1)}


@pytest.mark.parametrize("images", [1, 2, 3, 4])
def test_every_image_meets_both_orders(images: int) -> None:
    bench = Bench(images)
    base = bench.model("base", lambda run, image: 10 + image)
    candidate = bench.model("candidate", lambda run, image: (10 + image) / 2)
    rounds = 4 * images if images > 1 else 8
    got = measure_pair(
        *(candidate, base, bench.images),
        threads=1,
        min_rounds=rounds,
        max_rounds=rounds,
        warmup=0,
        clock=bench.clock,
    )
    assert got.images == images
    assert got.ratio == 0.5
    firsts = Counter(bench.runs[::2])
    assert set(firsts.values()) == {rounds // images // 2}
    assert len(firsts) == 2 * images
    assert [image for _, image in bench.runs] == [i % images for i in range(rounds) for _ in range(2)]


def test_many_models_share_the_rounds() -> None:
    bench = Bench(images=2)
    base = bench.model("base", lambda run, image: 10)
    models = {f"m{i}": bench.model(f"m{i}", lambda run, image, i=i: 2.0 * i) for i in (1, 2, 3)}  # type: ignore[misc]
    got = measure_many(
        models, base, bench.images, threads=2, min_rounds=8, max_rounds=8, warmup=3, clock=bench.clock
    )
    assert {name: latency.ratio for name, latency in got.items()} == pytest.approx(
        {"m1": 0.2, "m2": 0.4, "m3": 0.6}
    )
    assert [latency.threads for latency in got.values()] == [2, 2, 2]
    assert len({latency.base_ms for latency in got.values()}) == 1
    warm, timed = bench.runs[:12], [name for name, _ in bench.runs[12:]]
    assert Counter(name for name, _ in warm) == {"base": 3, "m1": 3, "m2": 3, "m3": 3}
    rounds = [timed[i : i + 4] for i in range(0, 32, 4)]
    assert all(set(names) == {"base", "m1", "m2", "m3"} for names in rounds)
    assert all(set(Counter(place).values()) == {2} for place in zip(*rounds, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 9])
def test_orders_are_balanced(count: int) -> None:
    orders = balanced_orders(count)
    assert all(sorted(order) == list(range(count)) for order in orders)
    places = Counter((place, item) for order in orders for place, item in enumerate(order))
    follows = Counter(pair for order in orders for pair in pairwise(order))
    assert len(set(places.values())) == 1
    assert len(places) == count * count
    assert len(follows) == count * (count - 1)
    assert len(set(follows.values())) <= 1


@pytest.mark.parametrize(
    ("n", "rank"), [(1, 1), (5, 1), (6, 1), (8, 1), (9, 2), (10, 2), (20, 6), (25, 8), (50, 18), (100, 40)]
)
def test_ranks_of_the_medians_interval(n: int, rank: int) -> None:
    """Ranks as printed in tables of the sign test's interval."""
    samples = [float(i) for i in range(1, n + 1)]
    assert median_interval(samples[::-1]) == (rank, n + 1 - rank)


def test_the_interval_covers_the_median() -> None:
    rng = np.random.default_rng(0)
    draws = np.exp(rng.normal(0.0, 0.3, size=(2000, 24)))  # true median 1
    intervals = [median_interval(row) for row in draws.tolist()]
    covered = np.mean([low <= 1.0 <= high for low, high in intervals])
    assert 0.95 <= covered <= 0.99


def test_garbage_collection_is_off_while_timing_only() -> None:
    bench = Bench()
    states: list[bool] = []

    def note(run: int, image: int) -> float:
        states.append(gc.isenabled())
        return 1.0

    base = bench.model("base", lambda run, image: 1.0)
    options: dict[str, Any] = {
        "threads": 1,
        "min_rounds": 6,
        "max_rounds": 6,
        "warmup": 2,
        "clock": bench.clock,
    }
    measure_pair(bench.model("candidate", note), base, bench.images, **options)
    assert states == [True] * 2 + [False] * 6
    assert gc.isenabled()

    def fail(run: int, image: int) -> float:
        raise RuntimeError("engine")

    with pytest.raises(RuntimeError, match="engine"):
        measure_pair(bench.model("candidate", fail), base, bench.images, **{**options, "warmup": 0})
    assert gc.isenabled()


def test_results_survive_json_and_tie_by_overlap() -> None:
    bench = Bench()
    base = bench.model("base", lambda run, image: 10)
    options: dict[str, Any] = {
        "threads": 1,
        "min_rounds": 6,
        "max_rounds": 6,
        "clock": bench.clock,
        "target_spread": 0.0,
    }

    def paired(times: list[float]) -> PairedLatency:
        return measure_pair(
            bench.model("m", lambda run, image: times[run % 6]), base, bench.images, warmup=0, **options
        )

    slow, middle, fast = paired([6, 7, 8] * 2), paired([5, 6, 6] * 2), paired([4, 5, 5.9] * 2)
    assert same_speed(slow, middle)
    assert same_speed(middle, fast)
    assert not same_speed(fast, slow)
    assert not same_speed(slow, fast)
    assert PairedLatency.model_validate_json(slow.model_dump_json()) == slow


def test_samples_are_rounded_and_give_the_ratio_exactly() -> None:
    bench = Bench()
    base = bench.model("base", lambda run, image: 10 + 1 / 3)
    candidate = bench.model("candidate", lambda run, image: 5 + 1 / 7)
    got = measure_pair(candidate, base, bench.images, threads=1, min_rounds=6, clock=bench.clock)
    assert set(got.base_ms.samples) == {10.3333}
    assert got.ratio == 5.1429 / 10.3333


def test_real_work_on_a_real_clock() -> None:
    # The process's own time: the tests may run beside anything.
    numbers = np.random.default_rng(0).random(50_000)

    class Sorting:
        def __init__(self, times: int) -> None:
            self.times = times

        def run(self, images: NDArray[np.float32]) -> Detections:
            for _ in range(self.times):
                np.sort(numbers)
            return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))

        def kernels(self) -> dict[str, str]:
            return {}

    got = measure_pair(
        Sorting(3), Sorting(1), Bench().images, threads=1, time_limit_s=1.0, clock=time.process_time
    )
    assert 2.5 < got.ratio < 3.5
    assert got.low <= got.quartiles[1]
    assert got.high >= got.quartiles[0]
    assert 0 < got.base_ms.p50 <= got.base_ms.p90


def test_bad_input() -> None:
    bench = Bench()
    model = bench.model("m", lambda run, image: 1.0)
    with pytest.raises(InputError, match="at least one image"):
        measure_pair(model, model, [], threads=1)
    with pytest.raises(InputError, match=r"must be \(1, 3, H, W\)"):
        measure_pair(model, model, [np.zeros((3, 8, 8), np.float32)], threads=1)
    with pytest.raises(InputError, match="between 6 and max_rounds"):
        measure_pair(model, model, bench.images, threads=1, min_rounds=9, max_rounds=8)
    with pytest.raises(InputError, match="name"):
        measure_many({"": model}, model, bench.images, threads=1)


def test_models_of_another_size_get_the_same_images_at_theirs() -> None:
    bench = Bench(images=2)
    smaller = [np.full((1, 3, 1, 1), 10 + k, dtype=np.float32) for k in range(2)]
    base, candidate = (bench.model(name, lambda run, image: 1.0) for name in ("base", "candidate"))
    options: dict[str, Any] = {
        "threads": 1,
        "min_rounds": 6,
        "max_rounds": 6,
        "warmup": 2,
        "clock": bench.clock,
    }
    measure_pair(candidate, base, bench.images, candidate_images=smaller, **options)
    seen = {name: {image for who, image in bench.runs if who == name} for name in ("base", "candidate")}
    assert seen == {"base": {0, 1}, "candidate": {10, 11}}
    rounds = [bench.runs[k : k + 2] for k in range(4, len(bench.runs), 2)]  # the first four are warm-up
    assert all({image % 10 for _, image in pair} == {k % 2} for k, pair in enumerate(rounds))
    with pytest.raises(InputError, match="must be 2"):
        measure_pair(candidate, base, bench.images, candidate_images=smaller[:1], **options)
