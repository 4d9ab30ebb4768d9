"""The front as one HTML page to explore: picture and table, without any network."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
import plotly.io

from search.figure_frame import BASE, FRONT, OTHERS, PEER, TRIAL, Frame, frame_of
from search.files import whole_file
from search.heat_map import HeatMap
from search.heat_picture import heat_figure
from search.report import (
    FrontRow,
    Interval,
    Peer,
    TrialPoint,
    front_caption,
    front_cells,
    short_count,
    speed_interval,
)

PEER_SYMBOLS = ("square", "diamond", "triangle-up", "triangle-down", "cross", "x")

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #111827 }}
body {{ max-width: 1100px; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.35rem; margin: 0 }}
h2 {{ font-size: 1.1rem; margin: 2rem 0 0 }}
p {{ color: #4b5563; margin: .2rem 0 1rem }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #e5e7eb }}
th {{ color: #4b5563; font-weight: 600 }}
td:last-child, th:last-child {{ text-align: left }}
tr.base {{ font-weight: 600 }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{subtitle}</p>
{picture}
<p>{hidden}</p>
{table}
<p>{caption}</p>
{heat}
</body>
</html>
"""


def front_html(
    file: Path,
    rows: Sequence[FrontRow],
    base: FrontRow,
    *,
    trials: Sequence[TrialPoint] = (),
    peers: Sequence[Peer] = (),
    title: str = "Front",
    subtitle: str = "",
    heat: HeatMap | None = None,
) -> None:
    """Write the front as a page of its own (about 5 MB, the plotting library included).

    Arguments as in `search.figures.front_png`; below the front the sensitivity `heat`, if there is one.
    """
    frame = frame_of(rows, base, trials, peers)
    picture = plotly.io.to_html(
        _figure(frame, peers),
        full_html=False,
        include_plotlyjs=True,
        div_id="front",
        config={"displaylogo": False, "responsive": True, "showSendToCloud": False},
    )
    page = _PAGE.format(
        title=html.escape(title),
        subtitle=html.escape(subtitle),
        picture=picture,
        table=_table(rows, base),
        caption=html.escape(front_caption(base, rows)),
        heat="" if heat is None else _heat(heat),
        hidden=f"{frame.hidden_label}: <i>autoscale</i> shows everything" if frame.hidden_label else "",
    )
    with whole_file(file) as draft:
        draft.write_text(page, encoding="utf-8")


def _heat(heat: HeatMap) -> str:
    picture = plotly.io.to_html(
        heat_figure(heat),
        full_html=False,
        include_plotlyjs=False,
        div_id="sensitivity",
        config={"displaylogo": False, "showSendToCloud": False},
    )
    return f"<h2>Sensitivity</h2>\n<p>{html.escape(heat.caption)}</p>\n{picture}"


def _figure(frame: Frame, peers: Sequence[Peer]) -> go.Figure:
    figure = go.Figure()
    figure.add_scatter(
        x=[trial.latency_ms for trial in frame.trials],
        y=[trial.map for trial in frame.trials],
        mode="markers",
        name=OTHERS,
        marker={"color": TRIAL, "size": 6, "opacity": 0.5},
        text=[f"trial {t.number}<br>mAP {t.map:.1f}<br>{t.latency_ms:.2f} ms" for t in frame.trials],
        hoverinfo="text",
    )
    figure.add_scatter(
        x=[x for x, _ in frame.line],
        y=[y for _, y in frame.line],
        mode="lines",
        line={"color": FRONT, "width": 1.5},
        opacity=0.7,
        hoverinfo="skip",
        showlegend=False,
    )
    figure.add_scatter(
        x=[row.latency_ms for row in frame.rows],
        y=[row.map for row in frame.rows],
        error_x=_bars(frame, [(r.latency_ms, r.latency_ratio, r.interval) for r in frame.rows], FRONT),
        mode="markers+text",
        name="front",
        marker={"color": FRONT, "size": 10, "line": {"color": "white", "width": 1}},
        text=[str(row.number) for row in frame.rows],
        textposition="top left",
        textfont={"color": FRONT, "size": 11},
        hovertext=[_hover(row, frame.base) for row in frame.rows],
        hoverinfo="text",
    )
    for count, peer in enumerate(peers):
        ms = peer.latency_ratio * frame.reference_ms
        figure.add_scatter(
            x=[ms],
            y=[peer.map],
            error_x=_bars(frame, [(ms, peer.latency_ratio, peer.interval)], PEER),
            mode="markers",
            name=html.escape(peer.name),
            marker={"color": PEER, "size": 10, "symbol": PEER_SYMBOLS[count % len(PEER_SYMBOLS)]},
            hovertext=f"<b>{html.escape(peer.name)}</b><br>"
            f"mAP {peer.map:.1f} ({peer.map - frame.base.map:+.1f})<br>"
            f"{ms:.2f} ms, {_speed(peer.latency_ratio, peer.interval)}",
            hoverinfo="text",
        )
    figure.add_scatter(
        x=[frame.base.latency_ms],
        y=[frame.base.map],
        mode="markers",
        name="base",
        marker={"color": BASE, "size": 15, "symbol": "star"},
        hovertext=_hover(frame.base, frame.base),
        hoverinfo="text",
    )
    speeds = frame.speed_ticks()
    # An axis is drawn only where a trace uses it.
    figure.add_scatter(x=[None], y=[None], xaxis="x2", showlegend=False, hoverinfo="skip")
    axis = {"gridcolor": "#e5e7eb", "zeroline": False, "linecolor": "#374151", "ticks": "outside"}
    figure.update_layout(
        template="none",
        height=600,
        margin={"l": 70, "r": 20, "t": 70, "b": 120},
        hoverlabel={"align": "left"},
        legend={"orientation": "h", "x": 0.5, "xanchor": "center", "y": -0.16, "yanchor": "top"},
        xaxis={**axis, "title": {"text": "latency of the whole detector, ms"}, "range": frame.x},
        yaxis={**axis, "title": {"text": html.escape(frame.map_label)}, "range": frame.y},
        xaxis2={
            "overlaying": "x",
            "side": "top",
            "matches": "x",
            "showgrid": False,
            "zeroline": False,
            "ticks": "outside",
            "title": {"text": "speed-up over the base"},
            "tickvals": [frame.reference_ms / speed for speed in speeds],
            "ticktext": [f"{speed:g}x" for speed in speeds],
        },
    )
    return figure


def _bars(frame: Frame, points: Sequence[tuple[float, float, Interval]], color: str) -> dict[str, object]:
    lengths = [frame.bar(ms, ratio, interval) for ms, ratio, interval in points]
    return {
        "type": "data",
        "symmetric": False,
        "arrayminus": [left for left, _ in lengths],
        "array": [right for _, right in lengths],
        "color": color,
        "thickness": 1.3,
        "width": 3,
    }


def _speed(ratio: float, interval: Interval) -> str:
    return f"{1 / ratio:.2f}x" + (f" ({speed_interval(interval)})" if interval else "")


def _hover(row: FrontRow, base: FrontRow) -> str:
    lines = [
        f"<b>{'base' if row.is_base else f'trial {row.number}'}</b>",
        f"mAP {row.map:.1f} ({row.map - base.map:+.1f})",
        f"{row.latency_ms:.2f} ms, {_speed(row.latency_ratio, row.interval)}",
        *([] if row.tensor_ms is None else [f"{row.tensor_ms:.2f} ms of it in the network"]),
        f"{row.size_mb:.2f} MB, {short_count(row.params)} parameters",
        html.escape(row.note),
    ]
    return "<br>".join(line for line in lines if line)


def _table(rows: Sequence[FrontRow], base: FrontRow) -> str:
    lines = front_cells(rows, base)
    out = ["<table>", "<tr>" + "".join(f"<th>{column}</th>" for column in lines[0]) + "</tr>"]
    for line in lines:
        kind = ' class="base"' if line["to base"] == "base" else ""
        out.append(
            f"<tr{kind}>" + "".join(f"<td>{html.escape(text)}</td>" for text in line.values()) + "</tr>"
        )
    return "\n".join([*out, "</table>"])
