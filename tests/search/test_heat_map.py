"""The heat map: its cells by hand, and pictures that hold what they should."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from search.figure_page import front_html
from search.heat_map import BOUNDS, COLORS, HeatMap, arranged, heat_map_of
from search.heat_picture import heat_figure, heat_png, level_names
from search.sensitivity import Sensitivity, sensitivity_of, store_sensitivity, stored_sensitivity
from tests.search.test_attribution import filled_study
from tests.search.test_figures import BASE, ROWS, share_of
from tests.search.test_sampler import MadeUp

INF = np.inf
KNOWN = Sensitivity(
    names=["sparsity a", "sparsity b", "bits a", "activation neck"],
    values=((0.0, 0.25, 0.5), (0.0, 0.5), (32.0, 16.0, 8.0), ("silu", "relu")),
    damage=np.array([[0, 1, 3], [0, 20, INF], [0, 0.01, INF], [0, 0.3, INF]]),
)


def test_cells_by_hand() -> None:
    sparsity, bits, activation = arranged(KNOWN, KNOWN.damage, True).panels
    assert (sparsity.title, sparsity.sites, sparsity.options) == ("sparsity", ["a", "b"], ["0.25", "0.5"])
    np.testing.assert_array_equal(sparsity.loss, [[1, 3], [np.nan, 20]])
    assert (bits.sites, bits.options) == (["a"], ["16", "8"])
    np.testing.assert_array_equal(bits.loss, [[0.01, np.nan]])
    assert (activation.sites, activation.options) == (["neck"], ["relu"])
    assert len(COLORS) == len(BOUNDS) == len(level_names())
    assert sparsity.levels[1, 1] == len(COLORS) - 1  # over 10 AP
    assert level_names()[int(sparsity.levels[0, 0])] == "1-2"
    assert level_names()[int(bits.levels[0, 0])] == "0-0.05"


def test_many_steps_share_eighths() -> None:
    """Sites with steps of their own (3, 5 and 7 of them) are read at eighths, between their values."""
    values = tuple(tuple(k / parts for k in range(parts)) for parts in (4, 6, 8))
    damage = np.array([[*(10 * v for v in own), *([INF] * (8 - len(own)))] for own in values])
    names = [f"sparsity {k}" for k in "abc"]
    (panel,) = arranged(Sensitivity(names, values, damage), damage, True).panels
    assert panel.options == ["0.125", "0.25", "0.375", "0.5", "0.625", "0.75", "0.875"]
    np.testing.assert_allclose(panel.loss[2], [10 * k / 8 for k in range(1, 8)])
    np.testing.assert_allclose(panel.loss[0], [1.25, 2.5, 3.75, 5, 6.25, 7.5, np.nan])
    np.testing.assert_allclose(panel.loss[1][-2:], [7.5, 10 * 5 / 6])


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    problem = MadeUp()
    study = filled_study(tmp_path, problem)
    assert stored_sensitivity(study) is None
    assert heat_map_of(study) is None
    store_sensitivity(study, sensitivity_of(problem.table, problem.damage))
    again = stored_sensitivity(study)
    assert again is not None
    assert again.names == problem.table.names
    np.testing.assert_allclose(again.damage, problem.damage, rtol=1e-5)
    params = [trial.params for trial in study.optuna.get_trials()]
    assert (again.options(params) == problem.table.options(params)).all()
    heat = heat_map_of(study)
    assert heat is not None
    assert heat.fitted
    assert "scaled to AP" in heat.caption


def test_pictures(tmp_path: Path) -> None:
    heat: HeatMap = arranged(KNOWN, KNOWN.damage, False)
    heat_png(tmp_path / "heat.png", heat)
    picture = imread(tmp_path / "heat.png")
    assert share_of(COLORS[-1], picture) > 1e-3
    assert to_rgb(COLORS[0]) != (1.0, 1.0, 1.0)  # the weakest level is not what an empty cell looks like
    assert [file.name for file in tmp_path.iterdir()] == ["heat.png"]
    figure = heat_figure(heat)
    assert [list(trace.y) for trace in figure.data] == [["a", "b"], ["a"], ["neck"]]
    front_html(tmp_path / "front.html", ROWS, BASE, heat=heat)
    page = (tmp_path / "front.html").read_text()
    assert page.count("Plotly.newPlot(") == 2
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*\b(?:src|href)=", page)
    with pytest.raises(OSError, match="missing"):
        heat_png(tmp_path / "missing" / "heat.png", heat)
