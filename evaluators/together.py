"""Models of one study, timed in one batch, so that they compare with each other, not with the base alone."""

from __future__ import annotations

from collections.abc import Mapping

from evaluators.bench import Bench
from evaluators.bench_config import LatencyConfig
from evaluators.latency import Images, PairedLatency, measure_many
from evaluators.targets.base import Session


def time_together(
    bench: Bench,
    sessions: Mapping[str, Session],
    base: Session,
    seconds: float,
    rounds: LatencyConfig | None = None,
    images_of: Mapping[str, Images] | None = None,
) -> dict[str, PairedLatency]:
    """Time sessions against the base while no worker of this machine computes; see `measure_many`.

    Args:
        bench: of the study, at the base's input size.
        sessions: by name.
        base: what they are compared with.
        seconds: of a batch.
        rounds: how many, and how narrow intervals should be; the bench's if None.
        images_of: by name, inputs of models that take another size.
    """
    rounds = rounds or bench.config.latency
    with bench.slot.computing():
        inputs = bench.timing_inputs
    with bench.slot.quiet():
        return measure_many(
            sessions,
            base,
            inputs,
            images_of=images_of,
            threads=bench.config.threads,
            min_rounds=rounds.min_rounds,
            max_rounds=rounds.max_rounds,
            target_spread=rounds.target_spread,
            time_limit_s=seconds,
        )
