"""The front as a PNG, for documents and the dashboard's notes."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluators.ranking import front
from search.figure_frame import BASE, FRONT, OTHERS, PEER, TRIAL, Frame, frame_of
from search.files import whole_file
from search.report import FrontRow, Peer, TrialPoint

PEER_MARKERS = "sD^vPX<>pdH8"
OTHER_PEERS = "other peers"
LEGEND_LETTERS = 112
"""That fit beside each other under the picture."""
QUIET_TEXT = "#4b5563"


def front_png(
    file: Path,
    rows: Sequence[FrontRow],
    base: FrontRow,
    *,
    trials: Sequence[TrialPoint] = (),
    peers: Sequence[Peer] = (),
    title: str = "Front",
    subtitle: str = "",
) -> None:
    """Draw the front into a PNG of 1600 x 1000 pixels.

    Args:
        file: appears complete or not at all.
        rows: the front; the base may be among them.
        base: the unchanged model.
        trials: all finished trials; those of the front may be among them.
        peers: other tools' models of the same base.
        title, subtitle: say what was searched, and where and how it was measured.
    """
    frame = frame_of(rows, base, trials, peers)
    figure = Figure(figsize=(8, 5), dpi=200, facecolor="white", layout="constrained")
    axes = figure.subplots()
    _draw_axes(axes, frame)
    axes.scatter(
        [trial.latency_ms for trial in frame.visible_trials],
        [trial.map for trial in frame.visible_trials],
        s=15,
        color=TRIAL,
        alpha=0.55,
        linewidths=0,
        zorder=2,
        label=OTHERS if frame.visible_trials else None,
    )
    axes.plot(*zip(*frame.line, strict=True), color=FRONT, linewidth=1.2, alpha=0.7, zorder=3)
    _draw_models(axes, frame, peers)
    axes.text(
        0.992,
        0.015,
        frame.hidden_label,
        transform=axes.transAxes,
        ha="right",
        fontsize=7.5,
        color=QUIET_TEXT,
    )
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    entries = {name: entries[name] for name in sorted(entries, key=_legend_place)}
    columns = max(1, min(4, LEGEND_LETTERS // max(len(name) + 6 for name in entries)))
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )
    heading = figure.suptitle(title, ha="left", fontsize=12, fontweight="bold")
    axes.set_title(subtitle, loc="left", fontsize=8.5, color=QUIET_TEXT, pad=8)
    figure.draw_without_rendering()  # settles the layout, which the next two depend on
    heading.set_x(axes.get_position().x0)
    _number_points(axes, frame)
    with whole_file(file) as draft:
        figure.savefig(draft, format="png")


def _legend_place(name: str) -> int:
    return {"base": 0, "front": 1, OTHER_PEERS: 3, OTHERS: 4}.get(name, 2)


def _draw_axes(axes: Axes, frame: Frame) -> None:
    axes.set(xlim=frame.x, ylim=frame.y, ylabel=frame.map_label)
    axes.set_xlabel("latency of the whole detector, ms")
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    speeds = frame.speed_ticks()
    top = axes.twiny()
    top.set_xlim(frame.x)
    top.set_xticks([frame.reference_ms / speed for speed in speeds], [f"{speed:g}x" for speed in speeds])
    top.set_xlabel("speed-up over the base", fontsize=8.5, color=QUIET_TEXT)
    top.tick_params(labelsize=8.5, color=QUIET_TEXT, labelcolor=QUIET_TEXT)
    for side in (axes, top):
        side.spines["right"].set_visible(False)


def _draw_models(axes: Axes, frame: Frame, peers: Sequence[Peer]) -> None:
    for count, row in enumerate(frame.rows):
        bar = frame.bar(row.latency_ms, row.latency_ratio, row.interval)
        _draw_model(axes, row.latency_ms, row.map, bar, "o", FRONT, "front" if count == 0 else None)
    _draw_peers(axes, frame, peers)
    axes.plot(
        [frame.base.latency_ms],
        [frame.base.map],
        marker="*",
        linestyle="none",
        markersize=13,
        markeredgecolor="white",
        color=BASE,
        zorder=6,
        label="base",
    )


def _draw_peers(axes: Axes, frame: Frame, peers: Sequence[Peer]) -> None:
    """Those that no other one beats with markers and names of their own, the others alike."""
    best = front([(peer.latency_ratio, -peer.map) for peer in peers]) if peers else []
    for count, peer in enumerate(peers[i] for i in best):
        ms = peer.latency_ratio * frame.reference_ms
        bar = frame.bar(ms, peer.latency_ratio, peer.interval)
        _draw_model(axes, ms, peer.map, bar, PEER_MARKERS[count % len(PEER_MARKERS)], PEER, peer.name)
    others = [peer for i, peer in enumerate(peers) if i not in best]
    if others:
        axes.plot(
            [peer.latency_ratio * frame.reference_ms for peer in others],
            [peer.map for peer in others],
            marker="o",
            linestyle="none",
            markersize=4.5,
            markerfacecolor="white",
            markeredgecolor=PEER,
            zorder=4,
            label=OTHER_PEERS,
        )


def _draw_model(
    axes: Axes, ms: float, ap: float, bar: tuple[float, float], marker: str, color: str, label: str | None
) -> None:
    if any(bar):
        axes.errorbar(ms, ap, xerr=[[bar[0]], [bar[1]]], color=color, elinewidth=1.1, capsize=2.2, zorder=4)
    axes.plot(
        [ms],
        [ap],
        marker=marker,
        linestyle="none",
        markersize=6.5,
        markeredgecolor="white",
        markeredgewidth=0.8,
        color=color,
        zorder=5,
        label=label,
    )


def _number_points(axes: Axes, frame: Frame) -> None:
    """Write trial numbers above left or below right of the points, where they cover nothing."""
    points = [axes.transData.transform((row.latency_ms, row.map)) for row in frame.rows]
    taken = [(x, y, 9.0, 9.0) for x, y in points]  # centre and half size, pixels
    for row, (x, y) in sorted(zip(frame.rows, points, strict=True), key=lambda pair: -pair[0].map):
        text = str(row.number)
        half = 7.0 * len(text)
        for side, align, level in ((-1, "right", "bottom"), (1, "left", "top")):
            place = (x + side * (12 + half), y - side * 18, half, 10.0)
            own = hypot(place[0] - x, place[1] - y)
            nearest = min(hypot(place[0] - px, place[1] - py) for px, py in points)
            # A number nearer to another point would be read as that one's.
            if nearest >= own and not any(_overlap(place, other) for other in taken):
                taken.append(place)
                axes.annotate(
                    text,
                    (row.latency_ms, row.map),
                    xytext=(4 * side, -3 * side),
                    textcoords="offset points",
                    ha=align,
                    va=level,
                    fontsize=7.5,
                    color=FRONT,
                    zorder=6,
                )
                break


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return abs(a[0] - b[0]) < a[2] + b[2] and abs(a[1] - b[1]) < a[3] + b[3]
