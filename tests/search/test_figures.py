from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from search.figure_frame import BASE as BASE_COLOR
from search.figure_frame import FRONT, PEER, frame_of
from search.figure_page import front_html
from search.figures import front_png
from search.report import FrontRow, Peer, TrialPoint


def row(number: int, ap: float, ratio: float) -> FrontRow:
    low, high = ratio * 0.9, ratio * 1.1
    return FrontRow(number, ap, "report.json", 10 * ratio, ratio, low, high, 1.5, 300_000, None, {})


BASE = replace(row(0, 50.0, 1.0), is_base=True)
ROWS = [BASE, row(4, 51.0, 0.5), row(9, 40.0, 0.25)]
TRIALS = [
    TrialPoint(0, 50.0, 10.0),
    TrialPoint(5, 45.0, 8.0),
    TrialPoint(6, 0.0, 4.0),
    TrialPoint(9, 40.0, 2.5),
]
PEERS = [Peer("another <tool>", 49.0, 0.8, 0.78, 0.82)]


def test_frame_by_hand() -> None:
    frame = frame_of(ROWS, BASE, TRIALS, PEERS)
    # 2.5 to 10 ms with 12 % of 7.5 beside it; 40 to 51 AP with 15 % of 11 above and below.
    assert frame.x == pytest.approx((1.6, 10.9))
    assert frame.y == pytest.approx((38.35, 52.65))
    assert [trial.number for trial in frame.trials] == [5, 6]
    assert [trial.number for trial in frame.visible_trials] == [5]
    assert frame.hidden_label == "1 other trial outside the picture"
    # The base is dominated by trial 4 and no corner of the line.
    assert frame.line == [(2.5, frame.y[0]), (2.5, 40.0), (5.0, 40.0), (5.0, 51.0), (frame.x[1], 51.0)]
    assert frame.reference_ms == 10.0
    assert frame.bar(8.0, 0.8, (0.6, 0.9)) == pytest.approx((2.0, 1.0))
    assert frame.bar(8.0, 0.8, None) == (0.0, 0.0)


def test_speed_ticks_are_inside_and_apart() -> None:
    frame = frame_of(ROWS, BASE, TRIALS, PEERS)
    ticks = frame.speed_ticks()
    places = [10.0 / speed for speed in ticks]
    assert {1.0, 2.0, 4.0} <= set(ticks)
    assert all(frame.x[0] <= place <= frame.x[1] for place in places)
    assert min(-np.diff(places)) >= 0.07 * (frame.x[1] - frame.x[0])


def share_of(color: str, picture: np.ndarray) -> float:
    return float((np.abs(picture[..., :3] - to_rgb(color)).max(axis=-1) < 0.02).mean())


def test_png_shows_front_base_and_peers(tmp_path: Path) -> None:
    front_png(tmp_path / "front.png", ROWS, BASE, trials=TRIALS, peers=PEERS, title="T", subtitle="S")
    picture = imread(tmp_path / "front.png")
    assert picture.shape[:2] == (1000, 1600)
    assert share_of("#ffffff", picture) > 0.8
    assert all(share_of(color, picture) > 1e-4 for color in (FRONT, BASE_COLOR, PEER))
    front_png(tmp_path / "front.png", ROWS, BASE)
    assert share_of(PEER, imread(tmp_path / "front.png")) == 0.0
    assert [file.name for file in tmp_path.iterdir()] == ["front.png"]


def test_html_needs_no_network(tmp_path: Path) -> None:
    front_html(
        tmp_path / "front.html", ROWS, BASE, trials=TRIALS, peers=PEERS, title="A <front>", subtitle="S"
    )
    page = (tmp_path / "front.html").read_text()
    assert "<title>A &lt;front&gt;</title>" in page
    assert "another &lt;tool&gt;" in page
    assert "<tool>" not in page
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*\b(?:src|href)=", page)
    assert page.count("<tr") == 1 + 3
    assert "Plotly.newPlot" in page
    assert len(page) > 1_000_000, "the plotting library is in the page"
    assert [file.name for file in tmp_path.iterdir()] == ["front.html"]


def test_a_study_that_has_only_its_base(tmp_path: Path) -> None:
    for rows in ([], [BASE]):
        front_png(tmp_path / "front.png", rows, BASE)
        front_html(tmp_path / "front.html", rows, BASE)
        frame = frame_of(rows, BASE, [], [])
        assert frame.x == pytest.approx((9.5, 10.5))
        assert frame.y == pytest.approx((49.5, 50.5))
        assert frame.rows == []


def test_no_picture_is_left_half_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        front_png(tmp_path / "missing" / "front.png", ROWS, BASE)
    with pytest.raises(OSError, match="missing"):
        front_html(tmp_path / "missing" / "front.html", ROWS, BASE)
    assert list(tmp_path.iterdir()) == []


def test_a_legend_of_many_peers_stays_inside(tmp_path: Path) -> None:
    """Those that others beat are named together; the others in as many columns as fit."""
    named = [Peer(f"a peer with a rather long name, number {k}", 50.0 - k, 0.9 - 0.1 * k) for k in range(5)]
    beaten = [Peer(f"beaten {k}", 44.0, 1.0 + k / 50) for k in range(20)]
    front_png(tmp_path / "front.png", ROWS, BASE, peers=[*beaten, *named])
    picture = imread(tmp_path / "front.png")[..., :3]
    assert picture.shape[:2] == (1000, 1600)
    for edge in (picture[:, :4], picture[:, -4:], picture[-4:]):
        assert edge.min() > 0.99, "white"
