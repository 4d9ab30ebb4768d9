"""Latency of a built model: a network with random weights, compressed, over its own float32 file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from evaluators.bench import Bench
from evaluators.bench_config import BenchConfig, LatencyConfig
from evaluators.datasets.base import DataConfig, load_splits
from evaluators.kernels import by_kind
from evaluators.together import time_together
from search.benchmarks.method_recipes import together
from search.benchmarks.recipes import exported
from search.benchmarks.reports import table, write
from spaces.detectors.registry import make_detector
from spaces.detectors.weights import save_weights
from spaces.effects import total_macs
from spaces.recipe import AnyChoice, Recipe

ROUNDS = LatencyConfig(min_rounds=24, max_rounds=120, target_spread=0.01)
SECONDS_A_MODEL = 20.0


@dataclass(frozen=True)
class Built:
    """A compressed model beside the float32 one.

    Attributes:
        name: what was done.
        macs: multiplications over the base's.
        ratio, low, high: latency over the base's, with its 95 % interval.
        ms: median of the batch.
        size_mb: of the file.
        kernels: number of layers by type, from the engine's own profile.
    """

    name: str
    macs: float
    ratio: float
    low: float
    high: float
    ms: float
    size_mb: float
    kernels: dict[str, int]


def built_bench(model: str, data: DataConfig, target: str, threads: int, seed: int, folder: Path) -> Bench:
    """A bench of a detector with random weights, which it stores in `folder`.

    Args:
        model: name of a detector.
        data: whose images are timed on and calibrate; the categories decide the heads' width.
    """
    classes = len(load_splits(data)["fit"].categories)
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "random.safetensors"
    save_weights(make_detector(model, classes).build(), weights)
    config = BenchConfig(
        model=model,
        checkpoint=weights,
        data=data,
        target=target,
        threads=threads,
        seed=seed,
        importance="magnitude",
        cache=folder / "cache",
    )
    return Bench(config)


def measure_built(
    bench: Bench, sparsity: float, rank: float, bits: int, folder: Path, say: Callable[[str], None]
) -> list[Built]:
    """The float32 model, each compression alone, and all together, timed in one batch."""
    every = together(bench, sparsity, rank, bits)
    alone: dict[str, list[AnyChoice]] = {"float32": []}
    for kind, name in (("prune", f"pruned by {sparsity:.0%}"), ("factorize", f"ranks of {rank:g}")):
        alone[name] = [choice for choice in every if choice.kind == kind]
    alone[f"{bits} bits"] = [choice for choice in every if choice.kind == "quantize"]
    alone["all three"] = every
    recipes = {
        name: Recipe(detector=bench.detector.name, choices=tuple(choices)) for name, choices in alone.items()
    }
    made = {}
    for number, (name, recipe) in enumerate(recipes.items()):
        say(f"exporting: {name}")
        made[name] = exported(bench, recipe, folder / str(number))
    reference = bench.target.prepare(made["float32"].file, bench.config.threads)
    say(f"timing {len(made)} models together")
    sessions = {name: one.session for name, one in made.items()}
    paired = time_together(bench, sessions, reference, SECONDS_A_MODEL * len(made), ROUNDS)
    whole = total_macs(bench.identity, bench.sites)
    rows = []
    for name, one in made.items():
        found = paired[name]
        rows.append(
            Built(
                name=name,
                macs=total_macs(recipes[name], bench.sites) / whole,
                ratio=found.ratio,
                low=found.low,
                high=found.high,
                ms=found.candidate_ms.p50,
                size_mb=one.file.stat().st_size / 1e6,
                kernels=by_kind(one.session.kernels()),
            )
        )
    return rows


def write_built(file: Path, model: str, engine: str, rows: list[Built], facts: Mapping[str, Any]) -> None:
    """Write the report."""
    lines = [
        "A built model: its weights are random, so there is no accuracy to speak of. Latency is that of the "
        "whole detector, decoding and suppression included, over that of its own float32 file in the same "
        "batch, with the 95 % interval.",
        "",
        *table(
            ["model", "MACs / float32", "latency / float32", "speed-up", "ms", "MB", "kernels"],
            [
                [
                    row.name,
                    f"{row.macs:.3f}",
                    f"{row.ratio:.4f} [{row.low:.4f}, {row.high:.4f}]",
                    f"{1 / row.ratio:.2f}x",
                    f"{row.ms:.1f}",
                    f"{row.size_mb:.2f}",
                    ", ".join(f"{count} {kind}" for kind, count in row.kernels.items()),
                ]
                for row in rows
            ],
        ),
    ]
    title = f"Latency of {model} in {engine}, a built model with random weights"
    write(file, title, lines, {"models": [asdict(row) for row in rows]}, facts)
