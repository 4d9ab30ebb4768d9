"""Latency as a paired ratio: candidate and base model timed in turn, on the same images.

These machines drift by tens of per cent within minutes, and both models drift together: the ratio of two
runs that follow each other is what stays. Take a measurement inside `QuietSlot.quiet()`.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median, quantiles

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from evaluators.targets.base import Predicting, Session
from evaluators.timing_statistics import FEWEST_ROUNDS, balanced_orders, base_drift, median_interval
from spaces.errors import InputError

Images = Sequence[NDArray[np.float32]]
SETTLING = 2
"""Untimed runs of a model before each timed one. A model that runs right behind another finds caches and
vector units in the other's state. Two candidates of YOLOX-nano, timed at once, took .58 and .44 of the base;
they take .51 and .35 alone, and .52 and .36 after two runs, whether two models take turns or seven (OpenVINO,
AMX).
"""
_BASE = ""


class Times(BaseModel):
    """Whole-detector times of one model, milliseconds, in the order of the rounds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    p50: float
    p90: float
    samples: tuple[float, ...]


class PairedLatency(BaseModel):
    """What one model takes relative to the base.

    Sample `i` of both models is of round `i`, on image `i % images`.

    Attributes:
        ratio: median over the rounds of candidate time / base time; lower is better.
        low, high: 95 % interval of that median within this batch.
        quartiles: of the rounds' ratios.
        candidate_ms, base_ms: the times that the ratio comes from.
        images: number of different images, taken in turn.
        threads: threads of the engine.
        affinity: CPUs that the process may use; empty where the system does not say.
        target_spread: bound that `spread` was asked to reach.
        drift: change of the base between the first and the last third of the rounds, 0.1 = 10 %.
        stable: False where the base drifted in every batch; the figures are then those of the steadiest.
        rejected_batches: batches thrown away because the base drifted.
        seconds: time spent, warm-up, rejected batches and all models of the batch included.
        predicted: nothing was measured: both times are computed from a description of the hardware.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratio: float
    low: float
    high: float
    quartiles: tuple[float, float]
    candidate_ms: Times
    base_ms: Times
    images: int
    threads: int
    affinity: tuple[int, ...]
    target_spread: float
    drift: float
    stable: bool
    rejected_batches: int
    seconds: float
    predicted: bool = False

    @property
    def rounds(self) -> int:
        """Number of paired runs."""
        return len(self.base_ms.samples)

    @property
    def spread(self) -> float:
        """Width of the interval relative to the ratio; above `target_spread` where time ran out."""
        return (self.high - self.low) / self.ratio


def measure_pair(
    candidate: Session,
    base: Session,
    images: Images,
    *,
    threads: int,
    min_rounds: int = 24,
    max_rounds: int = 400,
    target_spread: float = 0.02,
    time_limit_s: float = 10.0,
    warmup: int = 3,
    settling: int = SETTLING,
    max_drift: float = 0.1,
    max_batches: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    candidate_images: Images | None = None,
) -> PairedLatency:
    """Time a candidate against the base; see `measure_many`. Both take `images` unless there are others."""
    return measure_many(
        {"candidate": candidate},
        base,
        images,
        threads=threads,
        min_rounds=min_rounds,
        max_rounds=max_rounds,
        target_spread=target_spread,
        time_limit_s=time_limit_s,
        warmup=warmup,
        settling=settling,
        max_drift=max_drift,
        max_batches=max_batches,
        clock=clock,
        images_of=None if candidate_images is None else {"candidate": candidate_images},
    )["candidate"]


def measure_many(
    sessions: Mapping[str, Session],
    base: Session,
    images: Images,
    *,
    threads: int,
    min_rounds: int = 24,
    max_rounds: int = 400,
    target_spread: float = 0.02,
    time_limit_s: float = 10.0,
    warmup: int = 3,
    settling: int = SETTLING,
    max_drift: float = 0.1,
    max_batches: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    images_of: Mapping[str, Images] | None = None,
) -> dict[str, PairedLatency]:
    """Time several models against the base in one batch, so that they compare with each other, too.

    Each round times every model once on the same image, in an order that changes from round to round
    (with one candidate: base first, candidate first, ...), each after runs of its own that are not timed: a
    detector that serves runs behind itself, not behind others. Rounds go on until every ratio's interval is
    narrower than `target_spread`, or time or rounds run out. A batch in which the base's own time drifts
    is thrown away and repeated.

    Args:
        sessions: models by name, loaded into the engine with `threads` threads.
        base: the frozen base model, loaded in the same way.
        images: each `(1, 3, H, W)` float32, preprocessed; include blank and crowded ones, as NMS works
            differently on them.
        threads: stated in the result.
        min_rounds, max_rounds: `min_rounds` yields to the time limit, but `FEWEST_ROUNDS` are always run.
        target_spread: bound on the width of the 95 % interval relative to the ratio.
        time_limit_s: seconds of one batch after its warm-up; a round that has begun is ended.
        warmup: untimed runs of each model before each batch.
        settling: untimed runs of a model on the same image before each timed one.
        max_drift: bound on the base's drift within a batch.
        max_batches: batches at most; after the last, the steadiest counts and is marked unstable.
        clock: seconds, monotonic.
        images_of: by name, the same images at the size of models that take another one.

    Sessions of a target that computes latencies are not timed: their ratios are exact, and say so.

    Raises:
        InputError: no images, an image of another shape, other images for some model, or rounds out of order.
    """
    inputs = {_BASE: images, **dict.fromkeys(sessions, images), **(images_of or {})}
    for own in inputs.values():
        _check(own, len(images), min_rounds, max_rounds)
    if isinstance(base, Predicting):
        return {name: _predicted(session, base, threads) for name, session in sessions.items()}
    models = {_BASE: base, **sessions}
    if len(models) != len(sessions) + 1:
        raise InputError("latency", _BASE, "give every model a name")
    started = clock()
    kept: dict[str, list[float]] = {}
    drift, rejected = float("inf"), 0
    for _ in range(max_batches):
        for name, session in models.items():
            for run in range(warmup):
                session.run(inputs[name][run % len(images)])
        batch = _batch(models, inputs, min_rounds, max_rounds, target_spread, time_limit_s, settling, clock)
        batch_drift = base_drift(batch[_BASE], len(images))
        if batch_drift < drift:
            kept, drift = batch, batch_drift
        if batch_drift <= max_drift:
            break
        rejected += 1
    stable = drift <= max_drift
    seconds = clock() - started
    base_ms = _times(kept.pop(_BASE))
    results = {}
    for name, samples in kept.items():
        ratios = _ratios(samples, base_ms.samples)
        low, high = median_interval(ratios)
        first, _, third = quantiles(ratios, n=4, method="inclusive")
        results[name] = PairedLatency(
            ratio=median(ratios),
            low=low,
            high=high,
            quartiles=(first, third),
            candidate_ms=_times(samples),
            base_ms=base_ms,
            images=len(images),
            threads=threads,
            affinity=_affinity(),
            target_spread=target_spread,
            drift=drift,
            stable=stable,
            rejected_batches=rejected if stable else rejected - 1,
            seconds=seconds,
        )
    return results


def _predicted(session: Session, base: Predicting, threads: int) -> PairedLatency:
    """What was computed, in the form of what is measured: one round, an interval without width."""
    assert isinstance(session, Predicting), "a session is timed against a base of its own target"
    ratio = session.predicted_ms / base.predicted_ms
    return PairedLatency(
        ratio=ratio,
        low=ratio,
        high=ratio,
        quartiles=(ratio, ratio),
        candidate_ms=_times([session.predicted_ms]),
        base_ms=_times([base.predicted_ms]),
        images=0,
        threads=threads,
        affinity=(),
        target_spread=0.0,
        drift=0.0,
        stable=True,
        rejected_batches=0,
        seconds=0.0,
        predicted=True,
    )


def same_speed(a: PairedLatency, b: PairedLatency) -> bool:
    """True for a tie: the intervals of the two ratios overlap."""
    return a.low <= b.high and b.low <= a.high


def _batch(
    models: Mapping[str, Session],
    inputs: Mapping[str, Images],
    min_rounds: int,
    max_rounds: int,
    target_spread: float,
    time_limit_s: float,
    settling: int,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    """Times of every model, milliseconds by round."""
    names, images = list(models), len(inputs[_BASE])
    orders = balanced_orders(len(names))
    times: dict[str, list[float]] = {name: [] for name in names}
    with _no_garbage_collection():
        started = clock()
        for done in range(max_rounds):
            late = clock() - started >= time_limit_s
            if done >= FEWEST_ROUNDS and (late or (done >= min_rounds and _settled(times, target_spread))):
                break
            cycle, image = divmod(done, images)
            # An image meets another order in every cycle, whatever the number of images.
            for position in orders[(image + cycle) % len(orders)]:
                name = names[position]
                for _ in range(settling):
                    models[name].run(inputs[name][image])
                before = clock()
                models[name].run(inputs[name][image])
                # Rounded here so that the stored samples give exactly the stored ratio.
                times[name].append(round((clock() - before) * 1e3, 4))
    return times


def _settled(times: Mapping[str, list[float]], target_spread: float) -> bool:
    for samples in times.values():
        ratios = _ratios(samples, times[_BASE])
        low, high = median_interval(ratios)
        if high - low > target_spread * median(ratios):
            return False
    return True


def _ratios(candidate_ms: Sequence[float], base_ms: Sequence[float]) -> list[float]:
    return [candidate / base for candidate, base in zip(candidate_ms, base_ms, strict=True)]


def _times(samples: Sequence[float]) -> Times:
    p50, p90 = (float(np.percentile(samples, q)) for q in (50, 90))
    return Times(p50=round(p50, 4), p90=round(p90, 4), samples=tuple(samples))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _affinity() -> tuple[int, ...]:
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def _check(images: Images, count: int, min_rounds: int, max_rounds: int) -> None:
    if not images:
        raise InputError("latency images", None, "give at least one image to time on")
    if len(images) != count:
        raise InputError("latency images", len(images), f"must be {count}, the same for all models")
    for image in images:
        if image.ndim != 4 or image.shape[:2] != (1, 3):
            raise InputError("latency images", image.shape, "must be (1, 3, H, W)")
    if not FEWEST_ROUNDS <= min_rounds <= max_rounds:
        raise InputError("min_rounds", min_rounds, f"must lie between {FEWEST_ROUNDS} and max_rounds")
