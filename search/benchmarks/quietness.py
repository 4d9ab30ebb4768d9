"""The same models timed on an idle machine and beside workers that train, with the quiet slot and without."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluators.bench import Bench
from evaluators.latency import PairedLatency, same_speed
from evaluators.targets.base import Session, TensorPart
from evaluators.tensor_time import TensorSession
from evaluators.together import time_together
from search.benchmarks.load import training
from search.benchmarks.reports import rank_correlation, table, write
from spaces.errors import InputError
from spaces.recipe import Recipe

TRIAL_S = 60.0
SECONDS_A_MODEL = 3.0
IDLE, SLOT, NO_SLOT = "idle", "training, quiet slot", "training, no slot"


@dataclass(frozen=True)
class Timed:
    """A measurement, and the seconds from asking for it to having it."""

    latency: PairedLatency
    wall_s: float


@dataclass(frozen=True)
class Model:
    """A model that is timed.

    Attributes:
        name: in the report.
        session: the loaded file.
        tensor_part: of the same file.
        recipe: says the size of the input; without one it is the study's.
    """

    name: str
    session: Session
    tensor_part: TensorPart
    recipe: Recipe | None = None


Results = Mapping[str, Mapping[str, Timed]]
"""By condition, then by the model's name."""


def compare_conditions(
    bench: Bench,
    models: Sequence[Model],
    base: Session,
    workers: int,
    private: Path,
    say: Callable[[str], None],
) -> Results:
    """Time every model idle, beside `workers` training processes, and beside such as heed no slot.

    Args:
        bench: of the models.
        models: two or more.
        base: what ratios refer to.
        workers: training processes.
        private: an empty folder, whose slot nobody who measures uses.
        say: takes one line at a time.
    """
    if len(models) < 2:
        raise InputError("models", len(models), "name at least two to rank")
    with bench.slot.computing():
        assert bench.teacher is not None  # made once, before the processes ask for it

    def all_of() -> dict[str, Timed]:
        found = {}
        for model in models:
            started = time.monotonic()
            latency = _bench_of(bench, model).timed(model.session, base)
            found[model.name] = Timed(latency, time.monotonic() - started)
            say(f"  {model.name}: {latency.ratio:.3f} [{latency.low:.3f}, {latency.high:.3f}]")
        return found

    results = {}
    say("timing on the machine as it is, which should be idle")
    results[IDLE] = all_of()
    for condition, slot in ((SLOT, bench.slot.directory), (NO_SLOT, private)):
        say(f"timing beside {workers} processes ({condition})")
        with training(bench.config, workers, slot):
            results[condition] = all_of()
    return results


def tensor_times(
    bench: Bench, models: Sequence[Model], base: Session
) -> dict[str, tuple[PairedLatency, PairedLatency]]:
    """Whole detector and tensor part of each model, all in one batch, over the base's whole detector."""
    sessions: dict[str, Session] = {}
    images_of: dict[str, list[NDArray[np.float32]]] = {}
    for model in models:
        sessions[f"whole {model.name}"] = model.session
        sessions[f"tensor {model.name}"] = TensorSession(model.tensor_part)
        inputs = _bench_of(bench, model).timing_inputs
        images_of |= {f"whole {model.name}": inputs, f"tensor {model.name}": inputs}
    found = time_together(bench, sessions, base, SECONDS_A_MODEL * (len(sessions) + 1), images_of=images_of)
    return {m.name: (found[f"whole {m.name}"], found[f"tensor {m.name}"]) for m in models}


def _bench_of(bench: Bench, model: Model) -> Bench:
    """The bench at the size of a model's input."""
    return bench if model.recipe is None else bench.at(model.recipe)


def figures(results: Results, workers: int) -> dict[str, dict[str, float]]:
    """By condition: how far from idle, in which order, and what the measuring cost.

    `share` is of a study's wall-clock at trials of `TRIAL_S` seconds: while one worker measures all others
    wait, so that each round of trials is longer by as many measurements as there are workers.
    """
    idle = results[IDLE]
    found = {}
    for condition, rows in results.items():
        off = [abs(rows[n].latency.ratio / idle[n].latency.ratio - 1) for n in idle]
        ratios = [np.array([one[n].latency.ratio for n in idle]) for one in (rows, idle)]
        measuring = median(one.latency.seconds for one in rows.values())
        found[condition] = {
            "median_difference": median(off),
            "largest_difference": max(off),
            "spearman": rank_correlation(*ratios),
            "measuring_s": measuring,
            "wall_s": median(one.wall_s for one in rows.values()),
            "share": workers * measuring / (TRIAL_S + workers * measuring),
            "rejected_batches": float(sum(one.latency.rejected_batches for one in rows.values())),
            "unstable": float(sum(not one.latency.stable for one in rows.values())),
        }
    return found


def write_quietness(
    file: Path,
    title: str,
    results: Results,
    tensors: Mapping[str, tuple[PairedLatency, PairedLatency]],
    workers: int,
    facts: Mapping[str, Any],
) -> None:
    """Write the report."""
    said = figures(results, workers)
    idle = results[IDLE]
    names = sorted(idle, key=lambda name: -idle[name].latency.ratio)
    ties = [
        f"{a} and {b}"
        for place, a in enumerate(names)
        for b in names[place + 1 :]
        if same_speed(idle[a].latency, idle[b].latency)
    ]
    lines = [
        f"{len(names)} models, each timed in pairs with the base; then again beside {workers} processes that "
        "fine-tune without end. Differences and Spearman are to the idle ratios; the share is that of a "
        f"study's wall-clock at trials of {TRIAL_S:g} s with {workers} workers, who all wait.",
        "",
        *table(
            ["condition", "median difference", "largest", "Spearman", "measuring", "waiting too", "share"],
            [
                [
                    condition,
                    f"{one['median_difference']:.1%}",
                    f"{one['largest_difference']:.1%}",
                    f"{one['spearman']:.3f}",
                    f"{one['measuring_s']:.1f} s",
                    f"{one['wall_s']:.1f} s",
                    f"{one['share']:.1%}",
                ]
                for condition, one in said.items()
            ],
        ),
        "",
        *table(
            ["model", *results],
            [[name, *(_interval(rows[name].latency) for rows in results.values())] for name in names],
        ),
        "",
        f"Ties on the idle machine (their intervals overlap): {', '.join(ties) or 'none'}.",
        "",
        "Whole detector and tensor part in one batch; the tensor part is the file cut before decoding (ONNX: "
        "the graph up to the tensors that leave the network; torch: its submodule).",
        "",
        *table(
            ["model", "whole ms", "tensor part ms", "tensor / whole"],
            [
                [name, f"{w.candidate_ms.p50:.2f}", f"{t.candidate_ms.p50:.2f}", f"{t.ratio / w.ratio:.0%}"]
                for name, (w, t) in tensors.items()
            ],
        ),
    ]
    content = {
        "workers": workers,
        "conditions": said,
        "measurements": {
            condition: {name: one.latency.model_dump(mode="json") for name, one in rows.items()}
            for condition, rows in results.items()
        },
        "tensor_ms": {name: tensor.candidate_ms.p50 for name, (_, tensor) in tensors.items()},
        "whole_ms": {name: whole.candidate_ms.p50 for name, (whole, _) in tensors.items()},
    }
    write(file, title, lines, content, facts)


def _interval(latency: PairedLatency) -> str:
    return f"{latency.ratio:.3f} [{latency.low:.3f}, {latency.high:.3f}]"
