"""A description of this machine as a roofline, fitted to measured recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from evaluators.targets.onnx_target import OnnxTarget
from evaluators.targets.roofline import Description, Work, roofline, work_of
from search.benchmarks.recipes import measured, options_of, unseen_recipes
from search.benchmarks.reports import rank_correlation, table, write
from search.strategy import probe_recipes
from spaces.effects import bits_by_layer
from spaces.errors import InputError
from spaces.recipe import Recipe
from spaces.table import SpaceTable

LIMITS = 1e4
"""How far a fitted figure may leave its first guess, as a factor."""
PRIOR = 0.01
"""Weight of the first guess, so that figures that no recipe tells of keep it."""


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
    """Measure recipes to fit on and others to try it on.

    Raises:
        InputError: the target writes no ONNX files, whose work can be read.
    """
    if not isinstance(bench.target, OnnxTarget):
        raise InputError("target", bench.config.target, "choose an engine of ONNX files")
    space = SpaceTable(bench.space)
    known = probe_recipes(space, seen, seed)
    say(f"measuring {len(known)} recipes for the fit")
    first = _measured(bench, known, folder, say)
    ratios = np.array([one.latency.ratio for one in first])
    model = fit_latency(space, options_of(space, known), ratios)
    others = unseen_recipes(space, model, unseen, seed + 1, known)
    say(f"measuring {len(others)} others")
    return first, _measured(bench, others, folder, say)


def fit_description(name: str, recipes: Sequence[Measured], granule: int) -> Description:
    """The description that predicts the latencies with the least squared relative error.

    Times are taken as ratio times the median of the base's times in all batches: milliseconds of different
    minutes do not compare. Figures are positive, so their logarithms are fitted.
    """
    widths = sorted({work.bits for one in recipes for work in one.works if work.macs} | {32}, reverse=True)
    times = _times(recipes)
    gmacs = max(sum(w.macs for w in one.works) for one in recipes) / 1e9
    rate = gmacs / float(times.max()) * 1e3
    guess = [rate * 2 * 32 / max(width, 8) for width in widths]
    guess += [rate, 0.2, rate, 1.0, float(times.min()) / 20]

    def described(logarithms: NDArray[np.float64]) -> Description:
        *peaks, bandwidth, thin, elementwise, layer, fixed = np.exp(logarithms).tolist()
        return Description(
            name=name,
            peak_gmacs=dict(zip(widths, peaks, strict=True)),
            bandwidth_gbs=bandwidth,
            depthwise_share=min(thin, 1.0),
            elementwise_gops=elementwise,
            layer_us=layer,
            fixed_ms=fixed,
            granule=granule,
        )

    start = np.log(guess)

    def residuals(logarithms: NDArray[np.float64]) -> NDArray[np.float64]:
        description = described(logarithms)
        predicted = np.array([roofline(description, one.works).ms for one in recipes])
        return np.concatenate([predicted / times - 1, PRIOR * (logarithms - start)])

    bounds = (start - np.log(LIMITS), start + np.log(LIMITS))
    found = least_squares(residuals, start, bounds=bounds, diff_step=1e-4)
    return described(found.x)


def write_description(file: Path, description: Description, facts: Mapping[str, Any]) -> None:
    """Write the YAML file, with what it was fitted on as comments."""
    content = description.model_dump()
    content["peak_gmacs"] = {k: round(v, 3) for k, v in content["peak_gmacs"].items()}
    rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in content.items()}
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
    times, predicted = _times([*seen, *unseen])[len(seen) :], np.array([one.ms for one in found])
    error, order = float(np.median(np.abs(predicted / times - 1))), rank_correlation(predicted, times)
    lines = [
        f"Fitted on {len(seen)} measured random recipes, tried on {len(unseen)} others: Spearman "
        f"{order:.3f}, median error {error:.1%}.",
        "",
        *table(["figure", "fitted"], [[k, v] for k, v in _plain(description).items()]),
        "",
        "Share of the roofline: what the multiplications would take at the peaks of their bit-widths, over "
        "the measured one.",
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


def _plain(description: Description) -> dict[str, str]:
    shown = description.model_dump(exclude={"name", "peak_gmacs"})
    peaks = {f"peak at {bits} bits, GMAC/s": f"{v:.2f}" for bits, v in description.peak_gmacs.items()}
    return peaks | {key: f"{value:.4g}" for key, value in shown.items()}
