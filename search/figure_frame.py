"""What both pictures of a front share: the part of the plane shown, the front's line, ticks of speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evaluators.ranking import front
from search.report import FrontRow, Interval, Peer, TrialPoint, on_split, with_base

FRONT, TRIAL, BASE, PEER = "#1b5fc1", "#8b95a5", "#111827", "#c2570c"
OTHERS = "other trials, timed one by one"
"""The front took turns in one batch, which makes models a few per cent slower than in pairs with the base."""
SPEEDS = (1.0, 2.0, 1.5, 3.0, 1.25, 4.0, 1.75, 2.5, 0.75, 0.5, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0)


@dataclass(frozen=True)
class Frame:
    """A front on the plane of latency and mAP.

    Attributes:
        base: the unchanged model.
        rows: the other models of the front, slowest first.
        trials: trials that are neither.
        x, y: what is shown, milliseconds and mAP: front, base and peers, but not every broken trial.
        line: the best mAP within each latency, corner by corner.
    """

    base: FrontRow
    rows: list[FrontRow]
    trials: list[TrialPoint]
    x: tuple[float, float]
    y: tuple[float, float]
    line: list[tuple[float, float]]

    @property
    def reference_ms(self) -> float:
        """Milliseconds at a ratio of 1."""
        return self.base.latency_ms / self.base.latency_ratio

    @property
    def map_label(self) -> str:
        """Label of the mAP axis."""
        return f"COCO mAP{on_split(self.base)}"

    @property
    def visible_trials(self) -> list[TrialPoint]:
        """The trials inside the frame."""
        (left, right), (low, high) = self.x, self.y
        return [t for t in self.trials if left <= t.latency_ms <= right and low <= t.map <= high]

    @property
    def hidden_label(self) -> str:
        """Says how many trials are outside; empty where none is."""
        hidden = len(self.trials) - len(self.visible_trials)
        return f"{hidden} other trial{'s' * (hidden > 1)} outside the picture" if hidden else ""

    def bar(self, ms: float, ratio: float, interval: Interval) -> tuple[float, float]:
        """Lengths in milliseconds of an interval bar to the left and right of a point."""
        if interval is None:
            return 0.0, 0.0
        return max(ms * (1 - interval[0] / ratio), 0.0), max(ms * (interval[1] / ratio - 1), 0.0)

    def speed_ticks(self, apart: float = 0.07) -> list[float]:
        """Round speed-ups inside the frame, rounder ones first, `apart` of its width from each other."""
        width = self.x[1] - self.x[0]
        chosen: list[float] = []
        for speed in SPEEDS:
            place = self.reference_ms / speed
            free = all(abs(place - self.reference_ms / other) >= apart * width for other in chosen)
            if self.x[0] <= place <= self.x[1] and free:
                chosen.append(speed)
        return sorted(chosen)


def frame_of(
    rows: Sequence[FrontRow], base: FrontRow, trials: Sequence[TrialPoint], peers: Sequence[Peer]
) -> Frame:
    """Arrange a front for a picture; `rows` may hold the base, and `trials` the rows."""
    shown = with_base(rows, base)
    reference = base.latency_ms / base.latency_ratio
    times = [row.latency_ms for row in shown] + [peer.latency_ratio * reference for peer in peers]
    maps = [row.map for row in shown] + [peer.map for peer in peers]
    beside = max(0.12 * (max(times) - min(times)), 0.05 * max(times))
    above = max(0.15 * (max(maps) - min(maps)), 0.5)
    x = (max(min(times) - beside, 0.02 * max(times)), max(times) + beside)
    y = (max(min(maps) - above, -1.0), max(maps) + above)
    numbers = {row.number for row in shown}
    rest = [trial for trial in trials if trial.number not in numbers]
    return Frame(base, shown[1:], rest, x, y, _staircase(shown, x, y))


def _staircase(
    rows: Sequence[FrontRow], x: tuple[float, float], y: tuple[float, float]
) -> list[tuple[float, float]]:
    """Corners of the line: up at each model of the front, level until the next slower one."""
    best = front([(row.latency_ms, -row.map) for row in rows])
    corners: list[tuple[float, float]] = []
    level = y[0]
    for row in sorted((rows[i] for i in best), key=lambda row: row.latency_ms):
        corners += [(row.latency_ms, level), (row.latency_ms, row.map)]
        level = row.map
    return [*corners, (x[1], level)]
