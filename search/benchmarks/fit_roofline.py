"""A description of this machine as a roofline, fitted to measured recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from numpy.typing import NDArray
from scipy.optimize import least_squares

from evaluators.bench import Bench
from evaluators.latency import PairedLatency
from evaluators.latency_model import fit_latency
from evaluators.targets.roofline import Description, Work, roofline, work_of
from search.benchmarks.peaks import Limits
from search.benchmarks.recipes import measured, options_of, unseen_recipes
from search.benchmarks.reports import rank_correlation, table, write
from search.strategy import probe_recipes
from spaces.effects import bits_by_layer
from spaces.recipe import Recipe
from spaces.table import SpaceTable

PRIOR = 0.01
"""Weight of the first guess, so that figures that no recipe tells of keep it."""
STARTS = ((0.1, 0.5), (0.01, 0.1), (1.0, 10.0))
"""First guesses: shares of the peak of dense and depthwise layers; elements a second over the base's
multiplications a second."""


@dataclass(frozen=True)
class Measured:
    """A recipe's work and its latency."""

    recipe: Recipe
    works: list[Work]
    latency: PairedLatency

    @property
    def ms(self) -> float:
        """Its own median."""
        return self.latency.candidate_ms.p50


def recipes_for_roofline(
    bench: Bench, seen: int, unseen: int, seed: int, folder: Path, say: Callable[[str], None]
) -> tuple[list[Measured], list[Measured]]:
    """Measure recipes to fit on and others to try it on, in a target whose files are ONNX."""
    space = SpaceTable(bench.space)
    known = probe_recipes(space, seen, seed)
    say(f"measuring {len(known)} recipes for the fit")
    first = _measured(bench, known, folder, say)
    ratios = np.array([one.latency.ratio for one in first])
    model = fit_latency(space, options_of(space, known), ratios)
    others = unseen_recipes(space, model, unseen, seed + 1, known)
    say(f"measuring {len(others)} others")
    return first, _measured(bench, others, folder, say)


def fit_description(name: str, recipes: Sequence[Measured], granule: int, limits: Limits) -> Description:
    """The description that predicts the latencies with the least squared relative error.

    Times are taken as ratio times the median of the base's times in all batches: milliseconds of different
    minutes do not compare. Figures are positive, so their logarithms are fitted, from several starts. Peaks
    are not fitted: no layer of a small network comes near them, so the recipes say nothing of them.

    Args:
        name: of the hardware.
        recipes: to fit on.
        granule: see `Description`.
        limits: of the machine, as measured.
    """
    peaks, bandwidth, times = limits.peak_gmacs, limits.bandwidth_gbs, _times(recipes)
    widths, work = sorted(peaks, reverse=True), AllWork([one.works for one in recipes])
    gmacs = max(sum(w.macs for w in one.works) for one in recipes) / 1e9
    rate = gmacs / float(times.max()) * 1e3
    fixed = float(times.min())
    count = len(widths)

    def described(logarithms: NDArray[np.float64]) -> Description:
        found = np.exp(logarithms)
        moved, elementwise, layer, once = found[2 * count :].tolist()
        dense, thin = (np.minimum(part, 1.0).tolist() for part in (found[:count], found[count : 2 * count]))
        return Description(
            name=name,
            peak_gmacs={width: peaks[width] for width in widths},
            bandwidth_gbs=moved,
            dense_share=dict(zip(widths, dense, strict=True)),
            depthwise_share=dict(zip(widths, thin, strict=True)),
            elementwise_gops=elementwise,
            layer_us=layer,
            fixed_ms=once,
            granule=granule,
        )

    #         dense share   depthwise share   bandwidth, elements, start of a layer, once an image
    lower = [*[0.02] * count, *[1e-4] * count, bandwidth / 100, rate / 100, 0.01, fixed / 1000]
    upper = [*[1.0] * count, *[1.0] * count, bandwidth, rate * 100, 50.0, fixed]
    bounds = np.log(lower), np.log(upper)
    starts = [
        np.log([*[dense] * count, *[thin] * count, bandwidth / 4, elementwise * rate, 1.0, fixed / 20])
        for dense, thin, elementwise in product(*STARTS)
    ]

    def solved(start: NDArray[np.float64]) -> Any:
        def residuals(logarithms: NDArray[np.float64]) -> NDArray[np.float64]:
            predicted = work.milliseconds(described(logarithms))
            return np.concatenate([predicted / times - 1, PRIOR * (logarithms - start)])

        return least_squares(residuals, start, bounds=bounds, diff_step=1e-4)

    return described(min((solved(start) for start in starts), key=lambda found: found.cost).x)


class AllWork:
    """The work of many recipes as arrays, W operations in all: `roofline` for all of them at once.

    Args:
        works: of each of N recipes.
    """

    def __init__(self, works: Sequence[Sequence[Work]]) -> None:
        flat = [work for one in works for work in one]
        self._count = len(works)
        self._recipe = np.repeat(np.arange(len(works)), [len(one) for one in works])
        self._macs, self._elements, self._arithmetic = (
            np.array([getattr(work, field) for work in flat]) for field in ("macs", "elements", "arithmetic")
        )
        self._bits = np.array([work.bits for work in flat])
        self._depthwise = np.array([work.depthwise for work in flat])

    def milliseconds(self, description: Description) -> NDArray[np.float64]:
        """Time of every recipe `(N,)`, as `roofline` says it."""
        kinds = {(int(b), bool(d)) for b, d in zip(self._bits, self._depthwise, strict=True)}
        reached, width = np.ones(len(self._bits)), np.ones(len(self._bits))
        for bits, depthwise in kinds:
            here = (self._bits == bits) & (self._depthwise == depthwise)
            width[here] = description.native(bits)
            reached[here] = description.reached(description.native(bits), depthwise)
        computing = self._macs / reached / 1e6
        moving = self._elements * width / 8 / description.bandwidth_gbs / 1e6
        elementwise = self._arithmetic / (description.elementwise_gops or np.inf) / 1e6
        started = np.where(self._arithmetic > 0, 0.0, description.layer_us / 1e3)
        each = np.maximum(computing, moving) + elementwise + started
        summed = np.bincount(self._recipe, each, self._count).astype(np.float64)
        return description.fixed_ms + summed


def write_description(file: Path, description: Description, facts: Mapping[str, Any]) -> None:
    """Write the YAML file, with what it was fitted on as comments."""
    rounded = {k: _rounded(v) for k, v in description.model_dump().items()}
    comments = [f"# {key}: {value}" for key, value in facts.items()]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join([*comments, yaml.safe_dump(rounded, sort_keys=False)]))


def write_fit(
    file: Path,
    title: str,
    description: Description,
    seen: Sequence[Measured],
    unseen: Sequence[Measured],
    facts: Mapping[str, Any],
) -> None:
    """Write the report: error and order on the recipes not seen, and shares of the roofline."""
    found = [roofline(description, one.works) for one in unseen]
    all_times = _times([*seen, *unseen])
    times, predicted = all_times[len(seen) :], np.array([one.ms for one in found])
    error, order = float(np.median(np.abs(predicted / times - 1))), rank_correlation(predicted, times)
    lines = [
        f"Fitted on {len(seen)} measured random recipes, tried on {len(unseen)} others: Spearman "
        f"{order:.3f}, median error {error:.1%}.",
        "",
        *table(["figure", "value"], [[k, v] for k, v in _plain(description).items()]),
        "",
        "Peaks are what this engine reaches on large convolutions here, measured in the same run; the other "
        "figures are fitted. Share of the roofline: what the multiplications would take at the peaks of "
        "their bit-widths, over the measured time.",
        "",
        *table(
            ["measured ms", "predicted ms", "attained GMAC/s", "share of the roofline", "bound by memory"],
            [
                [
                    f"{ms:.2f}",
                    f"{one.ms:.2f}",
                    f"{one.gmacs / ms * 1e3:.1f}",
                    f"{one.ideal_ms / ms:.0%}",
                    f"{one.bound_by_memory:.0%} of the layers",
                ]
                for ms, one in sorted(zip(times.tolist(), found, strict=True), key=lambda pair: -pair[0])
            ],
        ),
    ]
    content = {
        "spearman": order,
        "median_error": error,
        "description": description.model_dump(),
        "recipes": [
            {"recipe": one.recipe.to_json(), "ms": float(ms), "predicted_ms": float(guess)}
            for one, ms, guess in zip(unseen, times, predicted, strict=True)
        ],
        "fitted on": [
            {"recipe": one.recipe.to_json(), "ms": float(ms)}
            for one, ms in zip(seen, all_times[: len(seen)], strict=True)
        ],
    }
    write(file, title, lines, content, facts)


def _measured(
    bench: Bench, recipes: Sequence[Recipe], folder: Path, say: Callable[[str], None]
) -> list[Measured]:
    granule = bench.capabilities.channel_granule
    rows = []
    for made, latency in measured(bench, recipes, folder, say):
        bits = bits_by_layer(made.recipe, bench.sites)
        runs = {layer: bench.capabilities.runs_at(width) for layer, width in bits.items()}
        rows.append(Measured(made.recipe, work_of(onnx.load(made.file), runs, granule), latency))
    return rows


def _times(recipes: Sequence[Measured]) -> NDArray[np.float64]:
    """Milliseconds of each, as ratio times the median base."""
    base = float(np.median([one.latency.base_ms.p50 for one in recipes]))
    return np.array([one.latency.ratio * base for one in recipes])


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _plain(description: Description) -> dict[str, str]:
    """Every figure as a row of the report says it."""
    shown = {}
    for key, value in description.model_dump(exclude={"name"}).items():
        by_width = value if isinstance(value, dict) else {None: value}
        for bits, one in by_width.items():
            said = key if bits is None else f"{key} at {bits} bits"
            shown[said + (" (measured)" if key == "peak_gmacs" else "")] = f"{one:.4g}"
    return shown
