"""`paredown explain`: which choice of a trial costs how much mAP and saves how many milliseconds."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from search.commands.options import (
    DEFAULT_STORAGE,
    AsJson,
    Checkpoint,
    Data,
    Storage,
    StudyName,
    config_of,
    overrides,
)

if TYPE_CHECKING:
    from rich.table import Table

    from search.attribution import Explanation


def explain(
    number: Annotated[int, typer.Argument(metavar="N", help="Number of the trial.")],
    study: StudyName,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
    data: Data = None,
    checkpoint: Checkpoint = None,
) -> int:
    """Show what each choice of a trial costs in AP and saves in milliseconds, by the study's models.

    --data and --checkpoint say where these are now.
    """
    from evaluators.bench import Bench
    from search.attribution import explain as explained
    from search.study import load_study
    from spaces.table import SpaceTable

    opened = load_study(study, url=storage)
    bench = Bench(config_of(opened, overrides(data, checkpoint)).bench)
    explanation = explained(opened, SpaceTable(bench.space), number)
    if as_json:
        print(json.dumps(explanation.to_json(), indent=1))
        return 0
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    console.print(explanation_table(explanation))
    return 0


def explanation_table(explanation: Explanation) -> Table:
    """The choices, and their sums beside what was predicted of the whole and measured."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from search.attribution import REMARK

    title = f"Trial {explanation.number}: {len(explanation.choices)} choices"
    table = Table(box=box.SIMPLE_HEAD, title=title, caption=f"{REMARK} {explanation.counted}")
    table.title_justify = table.caption_justify = "left"
    table.add_column("choice", overflow="fold")
    for name in ("value", "base", "AP lost", "ms saved"):
        table.add_column(name, justify="right", no_wrap=True)
    for choice in explanation.choices:
        name = escape(choice.parameter)
        table.add_row(
            name, _value(choice.value), _value(choice.undone), *_figures(choice.loss, choice.saved_ms)
        )
    table.add_section()
    totals = {
        "sum of the choices": (explanation.summed_loss, explanation.summed_saved_ms),
        "predicted together": (explanation.predicted_loss, explanation.predicted_saved_ms),
        "measured": (explanation.measured_loss, explanation.measured_saved_ms),
    }
    for name, figures in totals.items():
        table.add_row(name, "", "", *_figures(*figures))
    return table


def _value(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _figures(loss: float | None, saved: float | None) -> tuple[str, str]:
    return tuple("-" if figure is None else f"{figure:.2f}" for figure in (loss, saved))  # type: ignore[return-value]
