"""Reports of measurements: Markdown for readers, JSON beside it, with what they were measured on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from search.files import whole_file


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]


def signed(difference: tuple[float, float, float]) -> str:
    """A difference of AP with its interval, as cells show it."""
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*difference)


def write(
    file: Path,
    title: str,
    lines: Sequence[str],
    content: Mapping[str, Any],
    facts: Mapping[str, Any],
    indent: int | None = 1,
) -> None:
    """Write a report.

    Args:
        file: `.md`; the JSON gets the same name.
        title: of the report.
        lines: Markdown.
        content: the figures, raw, for the JSON.
        facts: hardware, versions, command and date.
        indent: of the JSON; None writes thousands of figures in one line.
    """
    text = [f"# {title}", "", *lines, "", *[f"- {key}: {value}" for key, value in facts.items()], ""]
    _replace(file, "\n".join(text))
    document = {"title": title, "facts": dict(facts), **content}
    _replace(file.with_suffix(".json"), json.dumps(document, indent=indent))


def rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Spearman's."""
    return float(spearmanr(a, b).statistic)


def _replace(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as draft:
        draft.write_text(text)
