"""The front as plain rows: a table for the terminal and JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

Interval = tuple[float, float] | None
"""95 % interval of a ratio, where it is known."""


@dataclass(frozen=True)
class FrontRow:
    """One model of the front (or the base), ready to be shown.

    Attributes:
        number: of the trial.
        map: COCO AP@[.50:.95], 0..100.
        split: annotations file that `map` was measured on.
        latency_ms: `latency_ratio` x the study's reference base latency.
        latency_ratio: candidate / base, lower is better.
        ratio_low, ratio_high: 95 % interval of the ratio; None where it was not measured in pairs.
        size_mb: model file on disk.
        params: parameters that are left.
        artifact: path of the model file.
        recipe: plain data.
        is_base: the unchanged model.
        note: anything that a reader must know, in a few words.
        tensor_ms: of `latency_ms`, what the network takes without decoding and suppression.
        likely: mAP minus the base's that is likely on other images; None where nothing is known.
        role: of the images that `map` was measured on; "" where the file says it.
    """

    number: int
    map: float
    split: str
    latency_ms: float
    latency_ratio: float
    ratio_low: float | None
    ratio_high: float | None
    size_mb: float
    params: int
    artifact: str | None
    recipe: dict[str, Any]
    is_base: bool = False
    note: str = ""
    tensor_ms: float | None = None
    likely: float | None = None
    role: str = ""

    @property
    def interval(self) -> Interval:
        """95 % interval of the ratio; the base's is 1 by definition where it was not measured."""
        if self.ratio_low is not None and self.ratio_high is not None:
            return self.ratio_low, self.ratio_high
        return (1.0, 1.0) if self.is_base else None


@dataclass(frozen=True)
class TrialPoint:
    """A finished trial that is not on the front."""

    number: int
    map: float
    latency_ms: float


@dataclass(frozen=True)
class Peer:
    """What another tool does to the same base, measured under the same protocol; ratios as in `FrontRow`."""

    name: str
    map: float
    latency_ratio: float
    ratio_low: float | None = None
    ratio_high: float | None = None

    @property
    def interval(self) -> Interval:
        """95 % interval of the ratio."""
        return (
            None if self.ratio_low is None or self.ratio_high is None else (self.ratio_low, self.ratio_high)
        )


def with_base(rows: Sequence[FrontRow], base: FrontRow) -> list[FrontRow]:
    """The base, then the other rows from the slowest to the fastest."""
    others = [row for row in rows if not row.is_base and row.number != base.number]
    return [base, *sorted(others, key=lambda row: (-row.latency_ratio, -row.map, row.number))]


def front_cells(rows: Sequence[FrontRow], base: FrontRow) -> list[dict[str, str]]:
    """The front as text by column, base first, then from the slowest to the fastest.

    Columns that would be empty in every row are left out.
    """
    shown = with_base(rows, base)
    letters = tie_letters([row.interval for row in shown])
    cells = [
        {
            "trial": str(row.number),
            "mAP": f"{row.map:.1f}",
            "to base": "base" if row.is_base else f"{row.map - base.map:+.1f}",
            "likely": "" if row.is_base or row.likely is None else f"{row.likely:+.1f}",
            "ms": f"{row.latency_ms:.2f}",
            # The base was timed against its own file, and how near that came to 1 is no speed-up.
            "speed-up": "1.00x" if row.is_base else f"{1 / row.latency_ratio:.2f}x",
            "interval": "" if row.is_base else speed_interval(row.interval),
            "tie": letter,
            "MB": f"{row.size_mb:.2f}",
            "params": short_count(row.params),
            "note": row.note,
        }
        for row, letter in zip(shown, letters, strict=True)
    ]
    empty = {column for column in cells[0] if not any(row[column] for row in cells)}
    return [{column: text for column, text in row.items() if column not in empty} for row in cells]


def front_caption(base: FrontRow, rows: Sequence[FrontRow]) -> str:
    """What the columns mean, for below the table."""
    tie = "; rows that share a letter under tie are equally fast within it"
    likely = " Likely: to base on other images, by what the other trials say of the same choices."
    tied = any(tie_letters([row.interval for row in with_base(rows, base)]))
    return (
        f"mAP: COCO AP@[.50:.95]{on_split(base)}. ms: whole detector, batch 1. Speed-up over the base with "
        f"its 95 % interval{tie * tied}.{likely * any(row.likely is not None for row in rows)}"
    )


def on_split(base: FrontRow) -> str:
    """` on FILE` or ` on ROLE (FILE)` for what mAP was measured on; empty where the file has no name."""
    file = PurePath(base.split)
    if not file.name or not base.role or file.stem == base.role:
        return f" on {file.name}" if file.name else ""
    return f" on {base.role} ({file.name})"


def front_table(rows: Sequence[FrontRow], base: FrontRow, title: str = "Front") -> Table:
    """The front for a terminal of 100 columns; see `front_cells`."""
    lines = front_cells(rows, base)
    table = Table(box=box.SIMPLE_HEAD, title=title, caption=front_caption(base, rows))
    table.title_justify = table.caption_justify = "left"
    for column in lines[0]:
        if column == "note":
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="left" if column == "tie" else "right", no_wrap=True)
    for line in lines:
        cells = [escape(text) for text in line.values()]
        table.add_row(*cells, style="bold" if line["to base"] == "base" else None)
    return table


def rows_to_json(rows: Sequence[FrontRow]) -> list[dict[str, Any]]:
    """Rows as JSON objects, in the given order."""
    return [
        {
            "number": row.number,
            "map": row.map,
            "split": row.split,
            "latency_ms": row.latency_ms,
            "latency_ratio": row.latency_ratio,
            "latency_ratio_interval": None if row.interval is None else list(row.interval),
            "size_mb": row.size_mb,
            "params": row.params,
            "likely_map_difference": row.likely,
            "artifact": row.artifact,
            "is_base": row.is_base,
            "note": row.note,
            "recipe": row.recipe,
        }
        for row in rows
    ]


def tie_letters(intervals: Sequence[Interval]) -> list[str]:
    """A letter for each group of intervals that all overlap; "" for one that overlaps no other.

    Two rows share a letter exactly where their intervals overlap (the compact letter display of Piepho,
    J. Computational and Graphical Statistics 13(2), 2004). Letters go by the order of the rows.
    """
    known = [(i, interval) for i, interval in enumerate(intervals) if interval is not None]
    # Intervals that all overlap have a point in common: the highest of their lower ends.
    groups = {tuple(i for i, (low, high) in known if low <= point <= high) for _, (point, _) in known}
    largest = [group for group in groups if not any(set(group) < set(other) for other in groups)]
    letters = [""] * len(intervals)
    for count, group in enumerate(sorted(group for group in largest if len(group) > 1)):
        letter = chr(ord("a") + count % 26) + (str(count // 26) if count >= 26 else "")
        for i in group:
            letters[i] += letter
    return letters


def speed_interval(interval: Interval) -> str:
    """Interval of a ratio, shown as one of the speed-up."""
    return "" if interval is None else f"{1 / interval[1]:.2f}-{1 / interval[0]:.2f}"


def short_count(count: int) -> str:
    """900 -> 900, 897_000 -> 897 k, 25_300_000 -> 25.3 M."""
    if count < 1_000:
        return str(count)
    return f"{count / 1e3:.0f} k" if count < 999_500 else f"{count / 1e6:.1f} M"
