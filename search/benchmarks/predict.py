"""How well latencies are predicted: a model fitted on some recipes, tried on others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from evaluators.bench import Bench
from evaluators.latency import PairedLatency
from evaluators.latency_model import fit_latency
from search.benchmarks.recipes import measured, options_of, unseen_recipes
from search.benchmarks.reports import rank_correlation, table, write
from search.strategy import probe_recipes
from spaces.recipe import Recipe
from spaces.table import SpaceTable


@dataclass(frozen=True)
class Prediction:
    """One recipe of the test.

    Attributes:
        recipe: what was done to the base.
        mixed: several bit-widths.
        macs: over the base's.
        latency: as measured.
        predicted, by_macs: ratios by the model, and by multiplications alone.
        extrapolates: the model's own word.
    """

    recipe: Recipe
    mixed: bool
    macs: float
    latency: PairedLatency
    predicted: float
    by_macs: float
    extrapolates: bool


@dataclass(frozen=True)
class TriedModel:
    """A latency model and what it was tried on.

    Attributes:
        known: recipes of the fit, with their ratios.
        own_error: median relative error, each recipe of the fit left out once.
        found: the others.
    """

    known: list[tuple[Recipe, float]]
    own_error: float
    found: list[Prediction]


def predictions(
    bench: Bench, seen: int, unseen: int, seed: int, folder: Path, say: Callable[[str], None]
) -> TriedModel:
    """Fit on `seen` recipes, predict `unseen` others, then measure those."""
    space = SpaceTable(bench.space)
    known = probe_recipes(space, seen, seed)
    say(f"measuring {len(known)} recipes for the fit")
    ratios = np.array([latency.ratio for _, latency in measured(bench, known, folder, say)])
    options = options_of(space, known)
    model = fit_latency(space, options, ratios)
    by_macs = _fit_macs(space.shapes(options).macs.sum(1), ratios)
    others = unseen_recipes(space, model, unseen, seed + 1, known)
    new = options_of(space, others)
    shapes = space.shapes(new)
    macs = shapes.macs.sum(1)
    guesses, outside = model.predict(new), model.extrapolates(new)
    say(f"measuring {len(others)} recipes that the model has not seen")
    found = [
        Prediction(
            made.recipe,
            len(set(shapes.bits[k].tolist())) > 1,
            float(macs[k] / space.base.macs.sum()),
            latency,
            float(guesses[k]),
            float(np.array([macs[k], 1.0]) @ by_macs),
            bool(outside[k]),
        )
        for k, (made, latency) in enumerate(measured(bench, others, folder, say))
    ]
    return TriedModel(list(zip(known, ratios.tolist(), strict=True)), model.error, found)


def figures(found: list[Prediction]) -> dict[str, float]:
    """Median relative errors and rank correlations, of the model and of multiplications alone."""
    measured_ = np.array([one.latency.ratio for one in found])
    ours, macs = (np.array([getattr(one, name) for one in found]) for name in ("predicted", "by_macs"))
    return {
        "median_error": float(np.median(np.abs(ours / measured_ - 1))),
        "spearman": rank_correlation(ours, measured_),
        "median_error_macs": float(np.median(np.abs(macs / measured_ - 1))),
        "spearman_macs": rank_correlation(macs, measured_),
        "range": float(measured_.max() / measured_.min()),
        "mixed": sum(one.mixed for one in found) / len(found),
        "extrapolating": float(sum(one.extrapolates for one in found)),
    }


def write_predictions(file: Path, title: str, tried: TriedModel, facts: Mapping[str, Any]) -> None:
    """Write the report."""
    found, said = tried.found, figures(tried.found)
    lines = [
        f"Fitted on {len(tried.known)} measured random recipes, tried on {len(found)} others, "
        f"{said['mixed']:.0%} of them of mixed precision, over a {said['range']:.1f}x range of latencies.",
        "",
        *table(
            ["prediction by", "median error", "Spearman"],
            [
                ["latency model", f"{said['median_error']:.1%}", f"{said['spearman']:.3f}"],
                ["MACs alone", f"{said['median_error_macs']:.1%}", f"{said['spearman_macs']:.3f}"],
            ],
        ),
        "",
        "The model's own estimate of its error, each recipe of the fit left out once: "
        f"{tried.own_error:.1%}. It says of {said['extrapolating']:.0f} recipes that it extrapolates.",
        "",
        *table(
            ["bit-widths", "MACs / base", "measured / base", "predicted", "error", "extrapolates"],
            [
                [
                    "mixed" if one.mixed else "one",
                    f"{one.macs:.2f}",
                    f"{one.latency.ratio:.3f} [{one.latency.low:.3f}, {one.latency.high:.3f}]",
                    f"{one.predicted:.3f}",
                    f"{one.predicted / one.latency.ratio - 1:+.1%}",
                    "yes" if one.extrapolates else "",
                ]
                for one in sorted(found, key=lambda one: -one.latency.ratio)
            ],
        ),
    ]
    rows = [
        {
            "recipe": one.recipe.to_json(),
            "ratio": [one.latency.ratio, one.latency.low, one.latency.high],
            "stable": one.latency.stable,
            "predicted": one.predicted,
            "by_macs": one.by_macs,
            "extrapolates": one.extrapolates,
        }
        for one in found
    ]
    known = [{"recipe": recipe.to_json(), "ratio": ratio} for recipe, ratio in tried.known]
    content = {**said, "own_error": tried.own_error, "recipes": rows, "fitted on": known}
    write(file, title, lines, content, facts)


def _fit_macs(macs: NDArray[np.float64], ratios: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slope and constant `(2,)`, not negative, with the least relative squared error."""
    matrix = np.stack([macs, np.ones(len(macs))], axis=1) / ratios[:, None]
    weights: NDArray[np.float64] = nnls(matrix, np.ones(len(ratios)))[0]
    return weights
