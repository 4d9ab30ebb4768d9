"""The sensitivity of a study arranged for a picture: sites by options, with the AP that each one costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.experience import ExperienceReader, believed_loss
from search.sensitivity import Sensitivity, stored_sensitivity
from search.study import SearchStudy
from spaces.space import LABELS, Value

STEPS = tuple(k / 8 for k in range(1, 8))
"""Columns for values of which there are more than fit: sites of different widths have steps of their own."""
BOUNDS = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""AP points between which one colour stands; the last colour is for all above the last bound."""
COLORS = ("#ecf2f9", "#d9e6f3", "#c0d6ec", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08254f")


@dataclass(frozen=True)
class HeatPanel:
    """One kind of choice.

    Attributes:
        title: what is chosen.
        sites: R names, in order of execution.
        options: C values.
        loss: `(R, C)` AP points; NaN where a site has no such option or nothing is known.
    """

    title: str
    sites: Sequence[str]
    options: Sequence[str]
    loss: NDArray[np.float64]

    @property
    def levels(self) -> NDArray[np.float64]:
        """Position `(R, C)` in `COLORS` of each loss; NaN stays NaN."""
        found = np.searchsorted(BOUNDS, self.loss, side="right") - 1.0
        return np.where(np.isnan(self.loss), np.nan, found)


@dataclass(frozen=True)
class HeatMap:
    """Panels, the one with the most sites first.

    Attributes:
        fitted: True where trials say what a unit of damage costs; else the colours only order the options.
    """

    panels: Sequence[HeatPanel]
    fitted: bool

    @property
    def caption(self) -> str:
        """What is seen, for below the picture."""
        scale = (
            "damage measured one option at a time without training, scaled to AP by the finished trials"
            if self.fitted
            else "damage measured one option at a time without training, not scaled to AP yet"
        )
        return f"AP lost by each option alone, as predicted: {scale}. Empty: no such option."


def heat_map_of(study: SearchStudy) -> HeatMap | None:
    """The sensitivity of a study; None where it was not measured."""
    sensitivity = stored_sensitivity(study)
    if sensitivity is None:
        return None
    experience = ExperienceReader(sensitivity).read(study.optuna.get_trials(deepcopy=False))
    fitted = bool(experience.finished.options.any())
    loss = sensitivity.damage
    if fitted:
        loss = believed_loss(sensitivity, loss, experience)[0].loss
    return arranged(sensitivity, loss, fitted)


def arranged(sensitivity: Sensitivity, loss: NDArray[np.float64], fitted: bool) -> HeatMap:
    """Panels of a loss `(P, O)` of options."""
    panels = []
    for label in LABELS.values():
        rows = [p for p, name in enumerate(sensitivity.names) if name.split(" ", 1)[0] == label]
        if rows:
            panels.append(_panel(label, rows, sensitivity, loss))
    return HeatMap(sorted(panels, key=lambda panel: -len(panel.sites)), fitted)


def _panel(label: str, rows: list[int], sensitivity: Sensitivity, loss: NDArray[np.float64]) -> HeatPanel:
    sites = [sensitivity.names[p].split(" ", 1)[1] for p in rows]
    values = [sensitivity.values[p] for p in rows]
    finite = np.where(np.isfinite(loss), loss, np.nan)
    distinct = list(dict.fromkeys(value for own in values for value in own[1:]))
    numbers = [float(value) for value in distinct if not isinstance(value, str)]
    if len(numbers) > len(STEPS):
        options = [f"{step:g}" for step in STEPS]
        cells = [_at_steps(own, finite[p]) for own, p in zip(values, rows, strict=True)]
        return HeatPanel(label, sites, options, np.array(cells))
    columns = sorted(distinct, key=lambda value: _strength(value, values))
    result = np.full((len(rows), len(columns)), np.nan)
    for r, (own, p) in enumerate(zip(values, rows, strict=True)):
        for o, value in enumerate(own[1:], start=1):
            result[r, columns.index(value)] = finite[p, o]
    return HeatPanel(label, sites, [v if isinstance(v, str) else f"{v:g}" for v in columns], result)


def _at_steps(values: Sequence[Value], loss: NDArray[np.float64]) -> NDArray[np.float64]:
    """Loss at `STEPS`, between a site's own values; NaN beyond its last one."""
    own = np.array([float(value) for value in values])
    result = np.interp(STEPS, own, loss[: len(own)])
    result[np.array(STEPS) > own.max() + 1 / 16] = np.nan
    return result


def _strength(value: Value, values: Sequence[Sequence[Value]]) -> float:
    """Where a value stands between the first and the last one of its sites, on average."""
    return float(np.mean([own.index(value) / (len(own) - 1) for own in values if value in own]))
