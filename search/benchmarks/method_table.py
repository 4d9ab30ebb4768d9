"""The table of methods and families, written row by row, and read again by whoever goes on with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from search.benchmarks.method_recipes import MEANING
from search.benchmarks.methods import InEngine, MethodBench, Row, Section
from search.benchmarks.reports import signed, table, write
from spaces.errors import InputError

TITLE = "Every method on every family"


def read_sections(file: Path) -> dict[str, Section]:
    """Sections by name, of the JSON beside a report; none where there is no report yet.

    Raises:
        InputError: the file is there and is no such report.
    """
    content = file.with_suffix(".json")
    if not content.exists():
        return {}
    try:
        stored = json.loads(content.read_text())["sections"]
        sections = [Section.model_validate(one) for one in stored]
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        raise InputError(
            "report", str(content), "is no report of methods; remove it or name another"
        ) from None
    return {section.name: section for section in sections}


def measure_methods(
    file: Path,
    bench: MethodBench,
    methods: Sequence[str],
    facts: Mapping[str, str],
    run: Mapping[str, str],
    say: Callable[[str], None],
) -> Section:
    """Measure the rows of a configuration that the report does not have, and write it after each.

    Rows count as measured where the section's key and the recipe are the same; a section of another key
    begins anew. Rows that failed are tried again.

    Args:
        file: `.md` of the report.
        methods: names of `MODERATE`; those that are left out keep the rows they have.
        facts: hardware, engines and threads of the section.
        run: command and date of the report.
    """
    sections = read_sections(file)
    section = sections.get(bench.name)
    if section is None or section.key != bench.key:
        section = bench.section(facts)
    sections[bench.name] = section
    for number, method in enumerate(methods):
        recipe = bench.recipe(method)
        key = "" if recipe is None else recipe.key
        if any(row.method == method and row.key == key and not row.failed for row in section.rows):
            say(f"{bench.name}: {method} is measured already")
            continue
        say(f"{bench.name}: {method}")
        row = bench.row(method, number)
        section.rows = sorted(
            [*(other for other in section.rows if other.method != method), row],
            key=lambda one: list(MEANING).index(one.method),
        )
        write_methods(file, sections.values(), run)
    write_methods(file, sections.values(), run)
    return section


def write_methods(file: Path, sections: Iterable[Section], run: Mapping[str, str]) -> None:
    """Write the report."""
    sections = list(sections)
    lines = [
        "AP on *report*: of the base, after one shot (the recipe carried out, BatchNorm statistics measured "
        "anew, nothing trained), and after the configuration's brief training. Latency is that of the whole "
        "detector over that of the base's float32 file in the same engine, with its 95 % interval.",
        "",
        *(f"- *{method}*: {meaning}" for method, meaning in MEANING.items()),
        "",
    ]
    for section in sections:
        lines += [*_section(section), ""]
    content: dict[str, Any] = {"sections": [one.model_dump(mode="json") for one in sections]}
    write(file, TITLE, lines, content, run)


def _section(section: Section) -> list[str]:
    engines = list(dict.fromkeys(name for row in section.rows for name in row.engines))
    head = ["method", "AP one-shot", "AP trained", "difference to the base"]
    for engine in engines:
        head += [f"latency, {engine}", f"AP, {engine}", "MB", "kernels"]
    body = [_cells(row, engines) for row in section.rows]
    said = ", ".join(f"{key} {value}" for key, value in section.facts.items())
    base = f"Base: {section.base_map:.2f} AP, {section.base_mb:.2f} MB. Training: {section.epochs} epoch(s)."
    return [
        f"## {section.name}: {section.detector}",
        "",
        f"{base} {said}.",
        "",
        *table(head, body),
    ]


def _cells(row: Row, engines: Sequence[str]) -> list[str]:
    if row.note:
        return [row.method, row.note, *[""] * (2 + 4 * len(engines))]
    cells = [
        row.method,
        _figure(row.one_shot),
        "not trained" if row.tuned is None else _figure(row.tuned),
        "" if row.difference is None else signed(row.difference),
    ]
    for engine in engines:
        cells += _engine_cells(row.engines[engine]) if engine in row.engines else [""] * 4
    return cells


def _engine_cells(found: InEngine) -> list[str]:
    kernels = ", ".join(f"{count} {kind}" for kind, count in found.kernels.items())
    return [
        f"{found.ratio:.3f} [{found.low:.3f}, {found.high:.3f}]" + ("" if found.stable else " unstable"),
        _figure(found.map),
        f"{found.size_mb:.2f}",
        kernels + (f"; {found.fell_back} not as chosen" if found.fell_back else ""),
    ]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
