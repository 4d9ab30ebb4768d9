"""The sensitivity of a study as a picture: a PNG, and a plot for the page of its front."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from search.files import whole_file
from search.heat_map import BOUNDS, COLORS, HeatMap, HeatPanel

ROW_INCHES, COLUMN_INCHES, GAP_ROWS = 0.145, 0.36, 4
QUIET_TEXT = "#4b5563"


def level_names() -> list[str]:
    """What each of `COLORS` stands for, AP points."""
    inner = [f"{low:g}-{high:g}" for low, high in pairwise(BOUNDS)]
    return [*inner, f"over {BOUNDS[-1]:g}"]


def heat_png(file: Path, heat: HeatMap, title: str = "Sensitivity", subtitle: str = "") -> None:
    """Draw a heat map into a PNG of 200 dots an inch; its height follows the number of sites.

    Args:
        file: appears complete or not at all.
        heat: what is drawn.
        title, subtitle: say of what.
    """
    columns = [column for column in _columns(heat) if column]
    rows = max(sum(len(panel.sites) + GAP_ROWS for panel in column) for column in columns)
    widths = [max(_label_inches(p) + COLUMN_INCHES * len(p.options) for p in c) + 0.3 for c in columns]
    width, height = max(sum(widths), 7.5), ROW_INCHES * rows + 1.0
    figure = Figure(figsize=(width, height), dpi=200, facecolor="white")
    left = 0.1
    for column, wide in zip(columns, widths, strict=True):
        top = height - 0.4
        labels = max(map(_label_inches, column))
        for panel in column:
            own = ROW_INCHES * len(panel.sites)
            top -= ROW_INCHES * (GAP_ROWS - 1)
            box = (left + labels, top - own, COLUMN_INCHES * len(panel.options), own)
            axes = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
            _draw_panel(axes, panel)
            top -= own + ROW_INCHES
        left += wide
    figure.text(0.1 / width, 1 - 0.2 / height, title, fontsize=12, fontweight="bold", va="center")
    figure.text(0.1 / width, 1 - 0.4 / height, subtitle, fontsize=8, color=QUIET_TEXT, va="center")
    patches = [
        Patch(facecolor=color, edgecolor="#d1d5db", linewidth=0.5, label=name)
        for color, name in zip(COLORS, level_names(), strict=True)
    ]
    figure.legend(
        handles=patches,
        loc="lower center",
        ncols=len(patches),
        fontsize=7,
        frameon=False,
        title="AP lost",
        title_fontsize=7.5,
        handlelength=1.2,
        columnspacing=1.0,
        bbox_to_anchor=(0.5, 0.12 / height),
    )
    figure.text(0.5, 0.08 / height, heat.caption, fontsize=6.5, color=QUIET_TEXT, ha="center")
    with whole_file(file) as draft:
        figure.savefig(draft, format="png")


def _columns(heat: HeatMap) -> list[list[HeatPanel]]:
    """Panels side by side, and below each other where that makes no column longer than the first panel."""
    columns: list[list[HeatPanel]] = [[heat.panels[0]]]
    longest = len(heat.panels[0].sites) + GAP_ROWS
    for panel in heat.panels[1:]:
        used = sum(len(other.sites) + GAP_ROWS for other in columns[-1])
        if len(columns) > 1 and used + len(panel.sites) + GAP_ROWS <= longest:
            columns[-1].append(panel)
        else:
            columns.append([panel])
    return columns


def _label_inches(panel: HeatPanel) -> float:
    return 0.058 * max(map(len, panel.sites)) + 0.15


def _draw_panel(axes: Axes, panel: HeatPanel) -> None:
    levels = np.ma.masked_invalid(panel.levels)
    axes.pcolormesh(
        levels,
        cmap=ListedColormap(COLORS),
        vmin=-0.5,
        vmax=len(COLORS) - 0.5,
        edgecolors="white",
        linewidth=0.6,
    )
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(panel.sites)) + 0.5, panel.sites, fontsize=6)
    axes.set_xticks(np.arange(len(panel.options)) + 0.5, panel.options, fontsize=6)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, pad=2, labelcolor="#111827")
    axes.set_title(panel.title, fontsize=8, fontweight="bold", pad=3, loc="left")
    for spine in axes.spines.values():
        spine.set_color("#d1d5db")
        spine.set_linewidth(0.5)


def heat_figure(heat: HeatMap) -> go.Figure:
    """The same for a page: one plot for each kind, one below the other, losses shown under the pointer."""
    from plotly.subplots import make_subplots

    heights = [len(panel.sites) for panel in heat.panels]
    row_pixels, gap_pixels = 15, 70
    total = row_pixels * sum(heights) + gap_pixels * len(heights) + 60
    figure = make_subplots(
        rows=len(heights),
        cols=1,
        row_heights=heights,
        vertical_spacing=min(gap_pixels / total, 1 / max(len(heights) - 1, 1)),
        subplot_titles=[panel.title for panel in heat.panels],
    )
    steps = [(k / len(COLORS), color) for k, color in enumerate(COLORS)]
    scale = [edge for (at, color) in steps for edge in ((at, color), (at + 1 / len(COLORS), color))]
    for k, panel in enumerate(heat.panels, start=1):
        figure.add_heatmap(
            z=panel.levels,
            x=[f"{option} " for option in panel.options],  # as text: numbers would be placed by value
            y=list(panel.sites),
            customdata=panel.loss,
            hovertemplate="%{y}<br>" + panel.title + " %{x}<br>%{customdata:.2f} AP lost<extra></extra>",
            zmin=-0.5,
            zmax=len(COLORS) - 0.5,
            colorscale=scale,
            xgap=1,
            ygap=1,
            showscale=k == 1,
            colorbar={
                "title": {"text": "AP lost"},
                "tickvals": list(range(len(COLORS))),
                "ticktext": level_names(),
                "len": 320,
                "lenmode": "pixels",
                "y": 1,
                "yanchor": "top",
            },
            row=k,
            col=1,
        )
        figure.update_xaxes(side="top", type="category", ticks="", row=k, col=1)
        figure.update_yaxes(
            autorange="reversed", type="category", dtick=1, tickfont={"size": 10}, ticks="", row=k, col=1
        )
    for title in figure.layout.annotations:
        title.update(x=0, xanchor="left", yshift=22, font={"size": 13})
    figure.update_layout(
        template="none", height=total, width=900, margin={"l": 230, "r": 40, "t": 60, "b": 20}
    )
    return figure
