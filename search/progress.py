"""What a running search shows: a live panel on a terminal, calm lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_SHOWN_POINTS = 6
_LINE_SECONDS = 30.0
"""Where there is no live panel, news of running jobs come this often at most."""


@dataclass(frozen=True)
class Point:
    """A point to show: trial number and objective values by name."""

    number: int
    values: dict[str, float]


@dataclass
class _Doing:
    job: str
    stage: str
    since: float


@dataclass
class Progress:
    """Knows what is going on and shows it; a context manager around the search.

    `started`, `stage`, `ended` follow the jobs; `totals` and `points` follow the study; `say` is for
    everything that is worth a line of its own.

    Attributes:
        total: how many trials the study shall have.
        stream: where to write; a terminal gets the live panel, anything else lines.
        quiet: show nothing (for callers that show something themselves).
        workers: how many share the work that is left.
    """

    total: int
    stream: TextIO = field(default_factory=lambda: sys.stdout)
    quiet: bool = False
    workers: int = 1

    def __post_init__(self) -> None:
        self._console = Console(file=self.stream, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._doing: dict[int, _Doing] = {}
        self._finished = self._failed = self._stopped = 0
        self._any_started = False
        self.base: Point | None = None
        self._front: list[Point] = []
        self._trial_seconds: list[float] = []
        self._preparing: tuple[int, int] | None = None
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        if not self.quiet and self._console.is_terminal:
            self._live = Live(self, console=self._console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """One line, above the live panel where there is one."""
        if not self.quiet:
            self._last_line = time.monotonic()
            self._console.print(Text(text))

    def _say_seldom(self, text: str) -> None:
        if self._live is None and time.monotonic() - self._last_line >= _LINE_SECONDS:
            self.say(text)

    def started(self, worker: int, job: str) -> None:
        self._doing[worker] = _Doing(job, "start", time.monotonic())
        if not self._any_started and self._live is None:  # until now it was waited for the workers
            self.say(f"worker {worker + 1}: {job}")
        self._any_started = True

    def stage(self, worker: int, next_stage: str) -> None:
        if worker in self._doing and next_stage:
            self._doing[worker].stage = next_stage
            self._say_seldom(f"worker {worker + 1}: {self._doing[worker].job}: {next_stage}")

    def ended(self, worker: int, *, trial: bool) -> None:
        """The job of a worker is over; the time of trials, but for the base's, goes into the estimate."""
        done = self._doing.pop(worker, None)
        if done is not None and trial:
            self._trial_seconds.append(time.monotonic() - done.since)

    def preparing(self, done: int, known: int) -> None:
        """Preparatory jobs: how many are done of those known so far."""
        self._preparing = (done, known) if done < known else None
        if self._preparing:
            self._say_seldom(f"preparing: {done}/{known} done")

    def totals(self, finished: int, failed: int, stopped: int = 0) -> None:
        """Trials that count, those among them that failed, and those that were stopped early."""
        self._finished, self._failed, self._stopped = finished, failed, stopped

    def points(self, base: Point | None, front: Sequence[Point]) -> None:
        self.base, self._front = base, list(front)

    def trial_line(self, number: int, what: str, *, failed: bool = False) -> None:
        """A trial has ended: a line where there is no live panel, or where it failed."""
        mark = " (on the front)" if any(point.number == number for point in self._front) else ""
        if self._live is None:
            self.say(f"[{self._finished}/{self.total}] trial {number}: {what}{mark}{self._left()}")
        elif failed:
            self.say(f"trial {number}: {what}")

    def seconds_left(self) -> float | None:
        """Estimate from the trials of this run, None before the first one has ended or while preparing."""
        if not self._trial_seconds or self._preparing:
            return None
        recent = self._trial_seconds[-20:]
        running = sum(min(time.monotonic() - d.since, recent[-1]) for d in self._doing.values())
        work = max(0, self.total - self._finished) * sum(recent) / len(recent) - running
        return max(0.0, work) / self.workers

    def _left(self) -> str:
        seconds = self.seconds_left()
        return "" if seconds is None or self._finished >= self.total else f", about {duration(seconds)} left"

    def __rich__(self) -> RenderableType:
        head = Text(f"trials {self._finished}/{self.total}", style="bold")
        if self._stopped:
            head.append(f"  stopped early {self._stopped}", style="dim")
        if self._failed:
            head.append(f"  failed {self._failed}", style="yellow")
        if self._preparing:
            head.append("  preparing {}/{}".format(*self._preparing), style="cyan")
        head.append(f"  {duration(time.monotonic() - self._started)}{self._left()}", style="dim")
        bar = ProgressBar(total=max(1, self.total), completed=self._finished, width=60)
        workers = Table.grid(padding=(0, 2))
        for worker, doing in sorted(self._doing.items()):
            spent = duration(time.monotonic() - doing.since)
            workers.add_row(f"worker {worker + 1}", doing.job, doing.stage, Text(spent, style="dim"))
        if not self._doing and not self._trial_seconds and self._finished < self.total:
            workers.add_row(Text("starting workers", style="dim"))
        parts: list[RenderableType] = [head, bar, workers]
        if self._front:
            parts.append(self._points_table())
        return Group(*parts)

    def _points_table(self) -> Table:
        table = Table(title="best points so far", title_justify="left", title_style="dim", box=None)
        found = [point for point in self._front if self.base is None or point.number != self.base.number]
        shown = ([self.base] if self.base else []) + found[:_SHOWN_POINTS]
        for name in ("trial", *shown[0].values):
            table.add_column(name, justify="right")
        for point in shown:
            label = "base" if point is self.base else str(point.number)
            table.add_row(label, *(describe_value(n, v, self.base) for n, v in point.values.items()))
        return table


def describe(point: Point, base: Point | None) -> str:
    """`map 57.1, latency_ms 12.3 (1.43x)` of one point."""
    return ", ".join(f"{name} {describe_value(name, value, base)}" for name, value in point.values.items())


def describe_value(name: str, value: float, base: Point | None) -> str:
    """A value with four significant digits, a latency with its speed-up over the base."""
    text = f"{value:.4g}"
    if name.startswith("latency") and base is not None and value > 0 and name in base.values:
        text += f" ({base.values[name] / value:.2f}x)"
    return text


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
