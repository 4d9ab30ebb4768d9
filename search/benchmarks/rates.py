"""Learning rates compared: the base, and the base with channels gone, trained by each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluators.bench import Bench
from evaluators.exported import model_in
from evaluators.jobs import Job
from evaluators.measuring import BASE_FOLDER, FURTHER_FOLDER
from evaluators.pipeline import CandidateWorker
from search.benchmarks.method_recipes import pruned
from search.benchmarks.methods import BRIEF, result_of
from search.benchmarks.on_report import OnReport
from search.benchmarks.reports import signed, table, write
from spaces.recipe import Recipe

RATES = (0.001, 0.002, 0.004, 0.008, 0.016)
SPARSITIES = (0.125, 0.25)
BASE = 0.0
"""Sparsity of the base, which is trained as long as what is pruned."""


@dataclass(frozen=True)
class Rated:
    """A training.

    Attributes:
        sparsity: of every channel site; `BASE` for the base.
        rate: at its highest.
        map: AP on report, 0..100.
        difference: to the base's AP before any training, with the 95 % interval over the images of report.
    """

    sparsity: float
    rate: float
    map: float
    difference: tuple[float, float, float]


def compare_rates(
    bench: Bench,
    rates: Sequence[float],
    folder: Path,
    say: Callable[[str], None],
    sparsities: Sequence[float] = SPARSITIES,
) -> tuple[float, list[Rated]]:
    """Train and score as a search does.

    Returns:
        AP of the base on report before any training, and the rows.
    """
    brief = bench.config.model_copy(update={"latency": BRIEF})
    on_report = OnReport(bench, folder / "base")
    rows = []
    for rate in rates:
        plan = brief.finetune.model_copy(update={"learning_rate": rate})
        artifacts = folder / f"{rate:g}"
        worker = CandidateWorker(brief.model_copy(update={"finetune": plan}), artifacts)
        for number, sparsity in enumerate((BASE, *sparsities)):
            choices = tuple(pruned(bench, sparsity)) if sparsity else ()
            recipe = Recipe(detector=bench.detector.name, choices=choices)
            job = Job(kind="trial", name=f"{sparsity:.1%}", number=number, recipe=recipe, seed=brief.seed)
            done = result_of(worker, job)
            further = model_in(artifacts / BASE_FOLDER / FURTHER_FOLDER)
            figure, apart = on_report(Path(str(done.artifact)) if sparsity else further)
            rows.append(Rated(sparsity, rate, figure, apart))
            say(f"  rate {rate:g}, {_name(sparsity)}: {figure:.2f} AP")
    return on_report.base, rows


def write_rates(
    file: Path, title: str, base: float, epochs: int, rows: Sequence[Rated], facts: Mapping[str, Any]
) -> None:
    """Write the report, the rates of a sparsity side by side."""
    lines = [
        f"The same share of the channels of every site gone, then {epochs} epoch(s) at rates that rise to "
        f"the one named and fall to 0. AP on *report*; the base has {base:.2f} before any training. Where "
        "it gains itself, it was not trained to its end: compare what is pruned with the row of its rate.",
        "",
        *table(
            ["pruned", "rate", "AP", "to the untrained base"],
            [
                [
                    _name(row.sparsity),
                    f"{row.rate:g}",
                    f"{row.map:.2f}",
                    signed(row.difference),
                ]
                for row in sorted(rows, key=lambda row: row.sparsity)
            ],
        ),
    ]
    content = {"base": base, "epochs": epochs, "rows": [asdict(row) for row in rows]}
    write(file, title, lines, content, facts)


def _name(sparsity: float) -> str:
    return f"{sparsity:.1%}" if sparsity else "nothing"
