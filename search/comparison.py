"""Front and peers measured together: the same images, the same protocol, one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from evaluators.accuracy import map_difference_interval
from evaluators.bench import Bench
from evaluators.bench_config import LatencyConfig
from evaluators.exported import CARD_FILE, ModelCard
from evaluators.targets.base import Session
from evaluators.together import time_together
from search.benchmarks.reports import signed, table, write
from search.figures import front_png
from search.front import Front
from search.report import Peer

ROUNDS = LatencyConfig(min_rounds=60, max_rounds=240, target_spread=0.01)
SECONDS_A_MODEL = 6.0
MAY_LOSE = 1.0
"""AP that the fastest peer may lose, and the fastest of what the search found beside it."""
PACKAGES = (
    "torch",
    "torch-pruning",
    "nncf",
    "onnxruntime",
    "olive-ai",
    "model-compression-toolkit",
)
SHOWN_AP = 8.0
"""A picture shows peers down to so far below its best model."""
TRIAL = "trial "
"""Begins the names of what the search found; all others are peers."""


@dataclass(frozen=True)
class Compared:
    """A model's figures beside those of the others.

    Attributes:
        name: of the model.
        size_mb: of its file or files.
        map, map_50: on each split, AP in 0..100, by the split's name.
        difference: to the base on each split, with a 95 % interval: (value, low, high).
        ratio: latency over the base's, (value, low, high).
        times_ms: of each round; round `i` of every model ran beside the same round of the base.
        recipe: of what the search found, as JSON; None of all others.
    """

    name: str
    size_mb: float
    map: Mapping[str, float]
    map_50: Mapping[str, float]
    difference: Mapping[str, tuple[float, float, float]]
    ratio: tuple[float, float, float]
    times_ms: tuple[float, ...] = ()
    recipe: Mapping[str, Any] | None = None


def compare(
    bench: Bench,
    models: Mapping[str, tuple[Session, Path]],
    base: str,
    splits: Sequence[str],
    say: Callable[[str], None],
) -> list[Compared]:
    """Time all models in one batch while the machine is quiet, and score them on the splits.

    Args:
        models: session and file by name; `base` is one of the names, and what ratios refer to.
        splits: roles or names of annotations files.
        say: takes a line at a time.
    """
    say(f"timing {len(models)} models together")
    sessions = {name: session for name, (session, _) in models.items()}
    with bench.slot.computing():
        benches = {name: bench_of(bench, file) for name, (_, file) in models.items()}
        inputs = {name: benches[name].timing_inputs for name in models}
    others = {name: session for name, session in sessions.items() if name != base}
    del inputs[base]
    paired = time_together(bench, others, sessions[base], SECONDS_A_MODEL * len(models), ROUNDS, inputs)
    figures: dict[str, dict[str, dict[str, float]]] = {name: {} for name in models}
    differences: dict[str, dict[str, tuple[float, float, float]]] = {name: {} for name in models}
    for split_name in splits:
        split = bench.split(split_name)
        say(f"scoring them on {split_name} ({len(split.images)} images)")
        found = {}
        for name, session in sessions.items():
            figures[name][split_name], found[name] = benches[name].scored(session, split)
        for name in models:
            differences[name][split_name] = map_difference_interval(split, found[name], found[base])
    rows = []
    for name, (_, file) in models.items():
        timed = paired.get(name)
        times = timed.candidate_ms if timed else next(iter(paired.values())).base_ms
        rows.append(
            Compared(
                name,
                _megabytes(file),
                {s: figures[name][s]["map"] for s in splits},
                {s: figures[name][s]["map_50"] for s in splits},
                differences[name],
                (timed.ratio, timed.low, timed.high) if timed else (1.0, 1.0, 1.0),
                tuple(round(ms, 4) for ms in times.samples),
                ModelCard.beside(file).recipe.model_dump(mode="json") if name.startswith(TRIAL) else None,
            )
        )
    return rows


def bench_of(bench: Bench, file: Path) -> Bench:
    """The bench at the size of a model's input, which its card says; peers have none and take the study's."""
    if not file.with_name(CARD_FILE).is_file():
        return bench
    return bench.at(ModelCard.beside(file).recipe)


def _megabytes(file: Path) -> float:
    weights = file.with_suffix(".bin")
    return (file.stat().st_size + (weights.stat().st_size if weights.exists() else 0)) / 1e6


def fastest(rows: Sequence[Compared], split: str, *, peer: bool) -> Compared | None:
    """The fastest peer, or trial, that loses no more than `MAY_LOSE` AP on a split; None where there is none.

    The base, which is one of the peers, always keeps that.
    """
    kind = [row for row in rows if row.name.startswith(TRIAL) != peer]
    good = [row for row in kind if row.difference[split][0] >= -MAY_LOSE]
    return min(good, key=lambda row: row.ratio[0], default=None)


def write_report(
    file: Path,
    title: str,
    rows: Sequence[Compared],
    taken: int | None,
    facts: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a comparison as Markdown, and as JSON beside it.

    Args:
        file: `.md`.
        taken: the trial that `finish` takes by itself; None where none is good enough.
        facts: hardware, versions, command, date.
        settings: of the study, for the JSON: with the recipes, others can make the models again.
    """
    splits = list(rows[0].map)
    against = fastest(rows, splits[-1], peer=True)
    assert against is not None, "the base loses nothing"
    head = ["model", *[f"AP {s}" for s in splits], *[f"difference {s}" for s in splits]]
    head += ["latency / base", f"speed-up over {against.name}", "MB"]
    body = []
    for row in rows:
        cells = [row.name, *[f"{row.map[s]:.2f}" for s in splits], *_figures(row, splits, against)]
        body.append([*cells, f"{row.size_mb:.2f}"])
    lines = [*_verdict(rows, splits[-1], against, taken), "", *table(head, body)]
    content = {"settings": settings, "taken": taken, "models": [asdict(row) for row in rows]}
    write(file, title, lines, content, facts, indent=None)


def _verdict(rows: Sequence[Compared], split: str, against: Compared, taken: int | None) -> list[str]:
    """The fastest of either kind, chosen by the same rule, and what a user is given who sees select alone."""
    chosen = {"fastest peer": against, "fastest of the front": fastest(rows, split, peer=False)}
    named = next((row for row in rows if row.name == f"{TRIAL}{taken}"), None)
    chosen[f"what `finish --max-map-drop {MAY_LOSE}` takes"] = named
    body = [
        [what, "none", "", "", ""] if row is None else [what, row.name, *_figures(row, [split], against)]
        for what, row in chosen.items()
    ]
    return [
        f"The first two lose no more than {MAY_LOSE} AP on {split}; the third was chosen without it.",
        "",
        *table(["which", "model", f"difference {split}", "latency / base", "speed-up over the peer"], body),
    ]


def _figures(row: Compared, splits: Sequence[str], against: Compared) -> list[str]:
    return [
        *(signed(row.difference[s]) for s in splits),
        "{:.3f} [{:.3f}, {:.3f}]".format(*row.ratio),
        f"{against.ratio[0] / row.ratio[0]:.2f}x",
    ]


def write_picture(
    file: Path, front: Front, compared: Sequence[Compared], split: str, title: str, subtitle: str
) -> None:
    """Draw the front and its peers as they were measured together.

    Args:
        file: `.png`.
        front: of the study; its rows give numbers and sizes, `compared` the figures.
        compared: trials under names that begin with `TRIAL`, everything else is a peer.
        split: whose mAP is drawn.
    """
    found = {row.name: row for row in compared}
    rows = []
    for row in front.rows:
        measured = found.get(f"{TRIAL}{row.number}")
        if measured is not None:
            ratio, low, high = measured.ratio
            rows.append(
                replace(
                    row,
                    map=measured.map[split],
                    split=split,
                    role="",
                    latency_ms=ratio * front.base.latency_ms,
                    latency_ratio=ratio,
                    ratio_low=low,
                    ratio_high=high,
                )
            )
    lowest = max(row.map[split] for row in compared) - SHOWN_AP
    peers = [Peer(r.name, r.map[split], *r.ratio) for r in compared[1:] if not r.name.startswith(TRIAL)]
    shown = [peer for peer in peers if peer.map > lowest]
    if len(shown) < len(peers):
        subtitle += f"; {len(peers) - len(shown)} peers below {lowest:.0f} AP not shown"
    base = replace(front.base, map=compared[0].map[split], split=split, role="", latency_ratio=1.0)
    front_png(file, rows, base, peers=shown, title=title, subtitle=subtitle)


def versions() -> dict[str, str]:
    """Versions of the packages that make peers, as far as they are installed."""
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def facts_of(bench: Bench, command: str) -> dict[str, str]:
    """Hardware, versions, command and date of a report."""
    signature = bench.target.signature(bench.config.threads)
    shown = {str(key): str(value) for key, value in signature.items()}
    return shown | {"command": command, "date": time.strftime("%Y-%m-%d %H:%M")}
