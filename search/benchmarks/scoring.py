"""What scoring a model costs around the engine: decoding, letterboxing, COCO figures, bootstrap."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluators.accuracy import coco_figures, map_difference_interval, to_original
from evaluators.bench import Bench
from evaluators.datasets.letterbox import decode, letterbox, network_input
from evaluators.datasets.split import DetectionSplit
from evaluators.parity import Parity, compare_sessions
from evaluators.targets.base import Detections, Session
from evaluators.torch_session import TorchSession
from search.benchmarks.recipes import exported
from search.benchmarks.reports import table, write

AROUND, SCORING_S, BOOTSTRAP_S, RESAMPLES = 1.3, 3.0, 10.0, 500
PARITY_IMAGES = 16


@dataclass(frozen=True)
class Profile:
    """Seconds of one pass over a split.

    Attributes:
        images: of the split.
        stages: seconds by stage: decode, letterbox, input, engine, output.
        figures_s: the 12 COCO figures.
        bootstrap_s: matching of both models and the resamples.
        parity: of the base's file with torch.
        figures: COCO's, of the base.
    """

    images: int
    stages: Mapping[str, float]
    figures_s: float
    bootstrap_s: float
    parity: Parity
    figures: Mapping[str, float]

    @property
    def around(self) -> float:
        """All stages together over the engine's own."""
        return sum(self.stages.values()) / self.stages["engine"]


def profile_of(bench: Bench, split: DetectionSplit, folder: Path, say: Callable[[str], None]) -> Profile:
    """Score the base on a split, stage by stage, while the machine is quiet."""
    made = exported(bench, bench.identity, folder)
    reference = TorchSession(bench.whole(bench.base))
    with bench.slot.computing():
        parity = compare_sessions(made.session, reference, bench.inputs(bench.select, PARITY_IMAGES))
    say(f"profiling {len(split.images)} images")
    with bench.slot.quiet():
        stages, found = _pass(bench, made.session, split)
        started = time.perf_counter()
        figures = coco_figures(split, found)
        figures_s = time.perf_counter() - started
        halved = {image: _first_half(one) for image, one in found.items()}
        started = time.perf_counter()
        map_difference_interval(split, halved, found, RESAMPLES)
        bootstrap_s = time.perf_counter() - started
    return Profile(len(split.images), stages, figures_s, bootstrap_s, parity, figures)


def write_profile(file: Path, title: str, found: Profile, facts: Mapping[str, Any]) -> None:
    """Write the report."""
    engine = found.stages["engine"]
    parity = found.parity
    lines = [
        f"One pass over {found.images} images. The engine's own time is that inside its call, which holds "
        "decoding and suppression as part of the file; around it are reading and decoding the image, "
        "letterboxing, conversion to the input, and boxes back to the original's pixels.",
        "",
        *table(
            ["stage", "seconds", "of the engine's"],
            [[name, f"{s:.3f}", f"{s / engine:.3f}"] for name, s in found.stages.items()],
        ),
        "",
        *table(
            ["what", "measured", "bound"],
            [
                ["everything / engine", f"{found.around:.2f}x", f"{AROUND}x"],
                ["COCO figures", f"{found.figures_s:.2f} s", f"{SCORING_S:g} s"],
                [f"bootstrap, {RESAMPLES} resamples", f"{found.bootstrap_s:.2f} s", f"{BOOTSTRAP_S:g} s"],
            ],
        ),
        "",
        f"The base's file beside torch on {parity.images} images: {parity.boxes:.0f} boxes, "
        f"{parity.unmatched} without a partner; largest difference of a score {parity.score_error:.1e}, of a "
        f"corner {parity.box_error:.1e} pixels. mAP {found.figures['map']:.2f}.",
    ]
    content = {
        "images": found.images,
        "stages_s": dict(found.stages),
        "everything_over_engine": found.around,
        "coco_figures_s": found.figures_s,
        "bootstrap_s": found.bootstrap_s,
        "parity": vars(parity),
        "map": found.figures["map"],
    }
    write(file, title, lines, content, facts)


def _pass(
    bench: Bench, session: Session, split: DetectionSplit
) -> tuple[dict[str, float], dict[int, Detections]]:
    """Seconds by stage, and what was found."""
    look, clock = bench.detector.preprocess, time.perf_counter
    stages = dict.fromkeys(("decode", "letterbox", "input", "engine", "output"), 0.0)
    found = {}
    for image in split.images:
        marks = [clock()]
        pixels = decode(image)
        marks.append(clock())
        boxed, scale = letterbox(pixels, look.size, look.pad_value, look.fit)
        marks.append(clock())
        array = network_input(boxed[None], look)
        marks.append(clock())
        detections = session.run(array)
        marks.append(clock())
        found[image.id] = to_original(detections, scale)
        marks.append(clock())
        for stage, begun, ended in zip(stages, marks, marks[1:], strict=False):
            stages[stage] += ended - begun
    return stages, found


def _first_half(found: Detections) -> Detections:
    """The better half of the boxes: another model for the bootstrap."""
    half = len(found.scores) // 2
    return Detections(found.boxes[:half], found.scores[:half], found.labels[:half])
