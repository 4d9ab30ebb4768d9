"""Criteria of importance compared: the same share of every site's channels pruned, by each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from evaluators.bench import Bench
from evaluators.importance import Importance
from evaluators.jobs import Job
from evaluators.pipeline import CandidateWorker
from search.benchmarks.method_recipes import pruned
from search.benchmarks.methods import BRIEF, result_of
from search.benchmarks.on_report import OnReport
from search.benchmarks.reports import signed, table, write
from spaces.recipe import Recipe

CRITERIA: tuple[Importance, ...] = get_args(Importance)
SPARSITIES = (0.125, 0.25, 0.5)


@dataclass(frozen=True)
class Pruned:
    """A criterion at a sparsity.

    Attributes:
        one_shot: AP on report, 0..100, norms measured anew and nothing trained.
        trained: AP on report after the configuration's training.
        difference: of `trained` to the base's AP, with the 95 % interval over the images of report.
    """

    criterion: Importance
    sparsity: float
    one_shot: float
    trained: float
    difference: tuple[float, float, float]


def compare_criteria(
    bench: Bench, sparsities: Sequence[float], folder: Path, say: Callable[[str], None]
) -> tuple[float, list[Pruned]]:
    """Prune, train and score as a search does.

    Returns:
        AP of the base on report, and the rows.
    """
    brief = bench.config.model_copy(update={"latency": BRIEF})
    on_report = OnReport(bench, folder / "base")
    rows = []
    for criterion in CRITERIA:
        changed = brief.model_copy(update={"importance": criterion})
        untrained = changed.finetune.model_copy(update={"epochs": 0})
        plans = {"one-shot": untrained, "trained": changed.finetune}
        workers = {
            name: CandidateWorker(changed.model_copy(update={"finetune": plan}), folder / criterion / name)
            for name, plan in plans.items()
        }
        for number, sparsity in enumerate(sparsities):
            recipe = Recipe(detector=bench.detector.name, choices=tuple(pruned(bench, sparsity)))
            job = Job(kind="trial", name=criterion, number=number, recipe=recipe, seed=brief.seed)
            ends = {name: on_report(Path(str(result_of(w, job).artifact))) for name, w in workers.items()}
            trained, apart = ends["trained"]
            rows.append(Pruned(criterion, sparsity, ends["one-shot"][0], trained, apart))
            say(f"  {criterion} {sparsity:.1%}: {ends['one-shot'][0]:.2f} AP, trained {trained:.2f}")
    return on_report.base, rows


def write_criteria(
    file: Path, title: str, base: float, epochs: int, rows: Sequence[Pruned], facts: Mapping[str, Any]
) -> None:
    """Write the report, the criteria of a sparsity side by side."""
    lines = [
        "The same share of the channels of every site, by each criterion of importance. AP on *report*, base "
        f"{base:.2f}: one-shot with norms measured anew and nothing trained; then after {epochs} epoch(s).",
        "",
        *table(
            ["sparsity", "criterion", "AP one-shot", "AP trained", "difference to the base"],
            [
                [
                    f"{row.sparsity:.1%}",
                    row.criterion,
                    f"{row.one_shot:.2f}",
                    f"{row.trained:.2f}",
                    signed(row.difference),
                ]
                for row in sorted(rows, key=lambda row: row.sparsity)
            ],
        ),
    ]
    content = {"base": base, "epochs": epochs, "rows": [asdict(row) for row in rows]}
    write(file, title, lines, content, facts)
