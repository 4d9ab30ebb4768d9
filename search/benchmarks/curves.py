"""Courses of searches as a PNG: what each had reached after so many trials or minutes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from search.figure_frame import FRONT
from search.figures import QUIET_TEXT
from search.files import whole_file

Values = NDArray[np.float64]
ROW = 0.036
"""Least distance of two labels, as a share of the axis."""


@dataclass(frozen=True)
class Curve:
    """One way to search.

    Attributes:
        name: written at its end.
        x: `(T,)` trials or minutes.
        middle: `(T,)` what was reached then; the line.
        low, high: `(T,)` the band around it; none where there is one run.
        ours: drawn on top, in the colour of fronts.
    """

    name: str
    x: Values
    middle: Values
    low: Values | None = None
    high: Values | None = None
    ours: bool = False


def draw_curves(file: Path, curves: Sequence[Curve], title: str, subtitle: str, x_label: str) -> None:
    """Draw hypervolumes into a PNG of 1600 x 1000 pixels, which appears complete or not at all.

    A curve that was cut short ends where it was; its name stands beside the others at the right edge.
    """
    figure = Figure(figsize=(8, 5), dpi=200, facecolor="white", layout="constrained")
    axes = figure.subplots()
    end = max(curve.x[-1] for curve in curves)
    top = 1.05 * max(curve.middle[-1] if curve.high is None else curve.high[-1] for curve in curves)
    axes.set(xlim=(0, end), ylim=(0, top), xlabel=x_label, ylabel="hypervolume, 1 = no loss in no time")
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    colours = dict(zip((curve.name for curve in curves), _palette(len(curves)), strict=True))
    colours |= {curve.name: FRONT for curve in curves if curve.ours}
    for curve in sorted(curves, key=lambda one: one.ours):
        colour = colours[curve.name]
        if curve.low is not None and curve.high is not None:
            axes.fill_between(curve.x, curve.low, curve.high, step="post", color=colour, alpha=0.18, lw=0)
        width = 2.2 if curve.ours else 1.3
        axes.step(curve.x, curve.middle, where="post", color=colour, linewidth=width)
    _name_ends(axes, curves, colours, top)
    heading = figure.suptitle(title, ha="left", fontsize=12, fontweight="bold")
    axes.set_title(subtitle, loc="left", fontsize=8.5, color=QUIET_TEXT, pad=8)
    figure.draw_without_rendering()  # settles the layout, which the next line depends on
    heading.set_x(axes.get_position().x0)
    with whole_file(file) as draft:
        figure.savefig(draft, format="png")


def _palette(count: int) -> list[object]:
    """Colours that differ from each other and from ours, strong ones first."""
    every = colormaps["tab20"].colors  # type: ignore[attr-defined]
    some = [*every[2::2], *every[3::2]]
    return [some[k % len(some)] for k in range(count)]


def _name_ends(axes: Axes, curves: Sequence[Curve], colours: dict[str, object], top: float) -> None:
    """Names at the right edge, highest first, pushed apart where ends are close."""
    ordered = sorted(curves, key=lambda curve: -curve.middle[-1])
    places = apart([float(curve.middle[-1]) / top for curve in ordered], ROW)
    for curve, place in zip(ordered, places, strict=True):
        axes.annotate(
            curve.name,
            (1.0, place),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colours[curve.name],
            fontweight="bold" if curve.ours else "normal",
            annotation_clip=False,
        )


def apart(places: Sequence[float], least: float) -> list[float]:
    """Descending places moved as little as needed to be `least` from each other and not below 0."""
    moved = [min(place, 1.0) for place in places]
    for k in range(1, len(moved)):
        moved[k] = min(moved[k], moved[k - 1] - least)
    floor = 0.0
    for k in range(len(moved) - 1, -1, -1):
        moved[k] = max(moved[k], floor)
        floor = moved[k] + least
    return moved
