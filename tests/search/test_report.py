from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from search.report import (
    FrontRow,
    front_caption,
    front_cells,
    front_table,
    on_split,
    rows_to_json,
    short_count,
    speed_interval,
    tie_letters,
)


def row(number: int, ap: float, ratio: float, **changes: object) -> FrontRow:
    """A row measured to 5 % on a base of 12 ms."""
    made = FrontRow(
        number=number,
        map=ap,
        split="data/annotations/report.json",
        latency_ms=12 * ratio,
        latency_ratio=ratio,
        ratio_low=ratio * 0.95,
        ratio_high=ratio * 1.05,
        size_mb=1.5,
        params=300_000,
        artifact=f"runs/{number}/model.onnx",
        recipe={"detector": "yolox_nano", "choices": []},
    )
    return replace(made, **changes)  # type: ignore[arg-type]


BASE = replace(row(0, 50.0, 1.0), is_base=True, ratio_low=None, ratio_high=None)


def test_cells_by_hand() -> None:
    rows = [row(7, 40.0, 0.25), BASE, row(3, 51.25, 0.5, note="bf16 stem")]
    base, slow, fast = front_cells(rows, BASE)
    assert base == {
        "trial": "0", "mAP": "50.0", "to base": "base", "ms": "12.00", "speed-up": "1.00x", "interval": "",
        "MB": "1.50", "params": "300 k", "note": "",
    }  # fmt: skip
    # 1 / (0.5 * 1.05) and 1 / (0.5 * 0.95)
    assert slow == base | {
        "trial": "3", "mAP": "51.2", "to base": "+1.2", "ms": "6.00", "speed-up": "2.00x",
        "interval": "1.90-2.11", "note": "bf16 stem",
    }  # fmt: skip
    assert (fast["trial"], fast["to base"], fast["speed-up"]) == ("7", "-10.0", "4.00x")


def test_the_caption_says_what_map_was_measured_on() -> None:
    assert on_split(BASE) == " on report.json"
    assert on_split(replace(BASE, role="report")) == " on report.json"
    assert on_split(replace(BASE, role="select", split="a/train.json")) == " on select (train.json)"
    assert on_split(replace(BASE, split="")) == ""


def test_ties_are_explained_where_there_are_any() -> None:
    assert "share a letter" in front_caption(BASE, [row(1, 48.0, 0.52), row(2, 47.0, 0.50)])
    assert "share a letter" not in front_caption(BASE, [row(1, 48.0, 0.5)])


def test_ties_have_a_column_where_there_are_any() -> None:
    rows = [row(1, 48.0, 0.52), row(2, 47.0, 0.50), row(3, 40.0, 0.3)]
    assert [cells["tie"] for cells in front_cells(rows, BASE)] == ["", "a", "a", ""]
    assert "tie" not in front_cells(rows[1:], BASE)[0]


def test_letters_stand_for_overlaps() -> None:
    # 0 and 1 overlap, 1 and 2 overlap, 0 and 2 do not; 3 is alone; 4 is unknown.
    intervals = [(1.0, 2.0), (1.5, 3.0), (2.5, 4.0), (5.0, 6.0), None]
    assert tie_letters(intervals) == ["a", "ab", "b", "", ""]
    assert tie_letters([(1.0, 2.0), (2.0, 3.0)]) == ["a", "a"]
    assert tie_letters([(1.0, 9.0), (2.0, 3.0), (2.5, 2.6), (5.0, 6.0)]) == ["ab", "a", "a", "b"]
    assert tie_letters([(1.0, 1.0)] * 3) == ["a", "a", "a"]
    assert tie_letters([]) == []


@pytest.mark.parametrize("seed", range(20))
def test_rows_share_a_letter_exactly_where_they_overlap(seed: int) -> None:
    import random

    draw = random.Random(seed)
    intervals = [(low, low + draw.uniform(0, 0.3)) for low in (draw.uniform(0, 1) for _ in range(10))]
    letters = tie_letters(intervals)
    for (low_a, high_a), a in zip(intervals, letters, strict=True):
        for (low_b, high_b), b in zip(intervals, letters, strict=True):
            if (low_a, high_a) != (low_b, high_b):
                assert bool(set(a) & set(b)) == (low_a <= high_b and low_b <= high_a)


def test_the_table_fits_a_terminal() -> None:
    rows = [row(i, 50.0 - i, 1 / (1 + i / 10), note="[red] is 12 % int8" * (i == 4)) for i in range(1, 12)]
    terminal = Console(width=100, file=io.StringIO(), force_terminal=False)
    terminal.print(front_table(rows, BASE, "A front"))
    text = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "..." not in text
    assert "…" not in text
    assert "[red] is 12 % int8" in text  # not taken for markup
    assert "report.json" in text
    assert "/annotations" not in text


def test_json_has_what_the_command_line_promises() -> None:
    (first, second) = json.loads(json.dumps(rows_to_json([BASE, row(3, 49.0, 0.5)])))
    promised = {"number", "map", "split", "latency_ms", "latency_ratio", "size_mb", "artifact", "recipe"}
    assert promised <= set(second)
    assert second["latency_ratio_interval"] == [0.475, 0.525]
    assert (first["is_base"], second["is_base"], second["latency_ms"]) == (True, False, 6.0)
    assert rows_to_json([]) == []


def test_short_forms() -> None:
    assert [short_count(n) for n in (900, 896_754, 999_499, 999_500, 25_300_000)] == [
        "900", "897 k", "999 k", "1.0 M", "25.3 M",
    ]  # fmt: skip
    assert speed_interval((0.5, 0.8)) == "1.25-2.00"
    assert speed_interval(None) == ""
