"""The report of what the search itself costs: workers' time, thousands of trials, hundreds of workers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median

import numpy as np
from pydantic import TypeAdapter

from search.benchmarks.many_trials import ManyTrials
from search.benchmarks.reports import table, write
from search.benchmarks.simulation import Simulated
from search.benchmarks.sleepers import Work, WorkerTime, share_at

SHARE, SPEED_UP, FIRST_JOB_S = 0.95, 1.8, 20.0
ASK_AND_TELL_S, FRONT_S, RESUME_S = 0.5, 5.0, 30.0

FIELDS = {"workers": "sleepers", "first-job": "first_job", "trials": "many", "simulation": "simulated"}
"""Of `Overhead`, by the part that fills them."""


@dataclass
class Overhead:
    """All that was measured.

    Attributes:
        work: of the sleeping workers.
        parameters: of every study here.
        sleepers: by number of workers.
        first_job: seconds of the lines that the command printed until a worker had a job, of the first such
            command and of one that found the data made.
        many: by database.
        simulated: by database, then by number of workers.
        ray_s: driver's seconds that a job costs in Ray, which the simulation takes for its own.
        commands: by part of the measurement, the command that it was measured by, with its date.
    """

    work: Work
    parameters: int
    sleepers: dict[int, WorkerTime] = field(default_factory=dict)
    first_job: list[list[tuple[str, float]]] = field(default_factory=list)
    many: list[ManyTrials] = field(default_factory=list)
    simulated: dict[str, list[Simulated]] = field(default_factory=dict)
    ray_s: float = 0.0
    commands: dict[str, str] = field(default_factory=dict)

    def begin(self, part: str, facts: Mapping[str, str]) -> None:
        """Forget what was measured of a part, which is measured now."""
        self.commands[part] = f"{facts['command']} ({facts['date']})"
        getattr(self, FIELDS[part]).clear()


def measured_before(file: Path, facts: Mapping[str, str], parameters: int) -> Overhead | None:
    """What a report holds, if it is of the same machine, versions and number of parameters.

    Args:
        file: of the report, `.md`.
        facts: hardware and versions of now; `command` and `date` may differ.
        parameters: of every study.
    """
    try:
        document = json.loads(file.with_suffix(".json").read_text())
        before: dict[str, str] = document["facts"]
        found = TypeAdapter(Overhead).validate_python(
            {key: document[key] for key in (one.name for one in fields(Overhead)) if key in document}
        )
    except (OSError, ValueError, KeyError):
        return None
    same = all(before.get(key) == value for key, value in facts.items() if key not in ("command", "date"))
    if not same or found.parameters != parameters:
        return None
    return found


def bars(found: Overhead) -> list[tuple[str, str, str, bool]]:
    """What was asked for: (what, bar, measured, kept), of the parts that were measured."""
    rows: list[tuple[str, str, str, bool]] = []

    def most(what: str, bar: float, value: float) -> None:
        rows.append((what, f"<= {bar:g} s", f"{value:.2f} s", value <= bar))

    for count, one in sorted(found.sleepers.items()):
        share = share_at(one, found.work)
        what = f"useful share of worker time at 60 s trials, {count} worker{'s' * (count > 1)}"
        rows.append((what, f">= {SHARE:.0%}", f"{share:.2%}", share >= SHARE))
    if {1, 2} <= found.sleepers.keys():
        gain = found.sleepers[2].trials_per_hour / found.sleepers[1].trials_per_hour
        rows.append(("trials of two workers over one's", f">= {SPEED_UP:g}", f"{gain:.2f}", gain >= SPEED_UP))
    if found.first_job:
        most("command to the first job of a worker", FIRST_JOB_S, found.first_job[-1][-1][1])
    for row in found.many:
        where = f"{row.trials} trials x {row.parameters} parameters, {row.database}"
        most(f"ask + tell, {where}", ASK_AND_TELL_S, row.ask_and_tell_s)
        most(f"front, {where}", FRONT_S, row.front_s + row.pictures_s)
        most(f"resume, {where}", RESUME_S, row.resume_s)
    return rows


def write_overhead(file: Path, found: Overhead, facts: Mapping[str, str]) -> None:
    """Write the report, with hardware and versions of `facts` and each part's own command."""
    rows = [[what, bar, value, "yes" if kept else "NO"] for what, bar, value, kept in bars(found)]
    lines = table(["what", "bar", "measured", "kept"], rows)
    for section in (_worker_time, _first_job, _many, _simulated):
        lines += section(found)
    content = asdict(found)
    facts = {key: value for key, value in facts.items() if key not in ("command", "date")}
    facts |= found.commands
    write(file, "What the search itself costs", lines, content, facts)


def _worker_time(found: Overhead) -> list[str]:
    if not found.sleepers:
        return []
    does = "multiply matrices" if found.work.products_per_s else "sleep"
    columns = sorted(found.sleepers.items())
    body: list[Sequence[object]] = []
    for kind in next(iter(found.sleepers.values())).seconds:
        cells = [f"{one.seconds[kind] / sum(one.seconds.values()):.2%}" for _, one in columns]
        body.append([kind, *cells])
    body += [
        ["trials", *(one.trials for _, one in columns)],
        ["trials an hour", *(f"{one.trials_per_hour:.1f}" for _, one in columns)],
        ["overhead a trial", *(f"{one.overhead_s:.3f} s" for _, one in columns)],
        ["driver's processor time a trial", *(f"{one.driver_cpu_s:.3f} s" for _, one in columns)],
        [f"useful share at {found.work.trial_s:g} s trials", *(f"{one.useful:.2%}" for _, one in columns)],
        ["the same at 60 s trials", *(f"{share_at(one, found.work):.2%}" for _, one in columns)],
    ]
    return [
        "",
        "## Where the time of workers goes",
        "",
        f"Real studies on local Ray, our sampler, {found.parameters} parameters, SQLite; workers that {does} "
        f"for {found.work.trial_s:g} s a trial in the stages of a real one, under a real quiet slot. Counted "
        "from the end of the base. Useful is training, evaluating, measuring, preparing (evaluating single "
        "choices, timing probes) and suspended for a measurement of somebody else; what a worker had no "
        "trial left for at the end is not counted.",
        "",
        *table(
            ["share of worker time", *(f"{count} worker{'s' * (count > 1)}" for count, _ in columns)], body
        ),
    ]


def _first_job(found: Overhead) -> list[str]:
    if not found.first_job:
        return []
    names = ["the first time, with data to be made", "again"][-len(found.first_job) :]
    lines = ["", "## From the command to the first job", ""]
    for name, said in zip(names, found.first_job, strict=True):
        lines += [f"{name}:", "", *table(["s", "line"], [[f"{at:.1f}", line] for line, at in said]), ""]
    return lines[:-1]


def _many(found: Overhead) -> list[str]:
    if not found.many:
        return []
    body = [
        [
            one.database,
            f"{one.open_s:.2f} + {one.read_s:.2f} + {one.first_ask_s:.2f}",
            f"{median(one.ask_s):.3f} (most {max(one.ask_s):.3f})",
            f"{median(one.tell_s):.3f} (most {max(one.tell_s):.3f})",
            f"{one.front_s:.2f} + {one.pictures_s:.2f}",
        ]
        for one in found.many
    ]
    head = ["database", "resume: open + read + first ask, s", "ask, s", "tell, s", "front + pictures, s"]
    first = found.many[0]
    return [
        "",
        f"## {first.trials} finished trials of {first.parameters} parameters",
        "",
        *table(head, body),
    ]


def _simulated(found: Overhead) -> list[str]:
    if not found.simulated:
        return []
    lines = [
        "",
        "## Hundreds of workers",
        "",
        "Workers on a virtual clock, trials of 60 s (log-normal); the driver's work is done and takes what "
        f"it takes, Ray's {found.ray_s * 1e3:.1f} ms a job are added. Counted over the second round of "
        "trials. Stale: trials that were told between a trial's ask and its tell.",
    ]
    for kind, each in found.simulated.items():
        head = ["workers", "trials/h", "at 60 s each", "workers busy", "driver busy", "driver s/trial"]
        head += ["stale, median (90 %)", "database s/trial", "statements/trial", "change first"]
        lines += ["", f"{kind}:", "", *table(head, [_row(one) for one in each])]
        last = each[-1]
        body = [
            [
                name,
                f"{cost.calls / last.trials:.1f}",
                f"{cost.seconds / last.trials:.4f}",
                f"{cost.database_s / last.trials:.4f}",
                f"{cost.statements / last.trials:.1f}",
            ]
            for name, cost in sorted(last.costs.items(), key=lambda item: -item[1].seconds)
        ]
        head = ["driver's work", "calls", "s", "of these database", "statements"]
        lines += ["", f"Of one trial with {last.workers} workers:", "", *table(head, body)]
    return lines


def _row(one: Simulated) -> list[str]:
    database = sum(cost.database_s for cost in one.costs.values()) / one.trials
    statements = sum(cost.statements for cost in one.costs.values()) / one.trials
    stale = np.percentile(one.staleness, [50, 90])
    return [
        str(one.workers),
        f"{one.trials_per_hour:.0f}",
        f"{60 * one.workers:.0f}",
        f"{one.busy:.1%}",
        f"{one.driver:.1%}",
        f"{one.driver_s:.4f}",
        f"{stale[0]:.0f} ({stale[1]:.0f})",
        f"{database:.4f}",
        f"{statements:.1f}",
        one.first_to_change,
    ]
