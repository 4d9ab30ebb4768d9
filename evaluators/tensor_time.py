"""The share of a detector's latency that is its network's, without decoding and suppression."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluators.bench import Bench
from evaluators.latency import measure_pair
from evaluators.targets.base import Detections, Predicting, Session, TensorPart

ROUNDS = 24
SECONDS = 0.4
"""Of one measurement, at most. With this and `LatencyConfig` a trial is timed in about 3 s, so that two
workers wait for less than a tenth of a study whose trials take a minute.
"""


class TensorSession:
    """A tensor part in the form that is timed; its detections are nobody's."""

    def __init__(self, part: TensorPart) -> None:
        self._part = part
        nothing = np.zeros(0, np.float32)
        self._found = Detections(nothing.reshape(0, 4), nothing, np.zeros(0, np.int64))

    def run(self, images: NDArray[np.float32]) -> Detections:
        """`(1, 3, H, W)` float32, preprocessed."""
        self._part.run(images)
        return self._found

    def kernels(self) -> dict[str, str]:
        """Nobody asks."""
        return {}


def tensor_share(bench: Bench, session: Session, model: Path, hint: str) -> float | None:
    """Median over paired rounds of tensor part time / whole detector time, on the study's timing images.

    None where latencies are computed instead of measured. Only part and whole are in the batch, so that the
    candidate's latency over the base's is measured as it is without this.

    Args:
        bench: at the size of the model's input.
        session: of the whole file.
        model: that file.
        hint: precision that it is run with.
    """
    if isinstance(session, Predicting):
        return None
    threads = bench.config.threads
    with bench.slot.computing():
        images, part = bench.timing_inputs, bench.target.prepare_tensor_part(model, threads, hint)
    with bench.slot.quiet():
        return measure_pair(
            TensorSession(part),
            session,
            images,
            threads=threads,
            min_rounds=min(ROUNDS, bench.config.latency.min_rounds),
            max_rounds=ROUNDS,
            time_limit_s=SECONDS,
            max_batches=1,
        ).ratio
