"""The base at smaller inputs, as users reduce it, where the search may choose one too."""

from __future__ import annotations

from pathlib import Path

from evaluators.bench import Bench
from spaces.inputs import shown_size
from spaces.recipe import Recipe, Resize

REDUCED_LOSS = 1.0
"""AP that a peer's smaller input may cost on select."""

Reduced = dict[str, tuple[Bench, Path]]
"""Bench and float32 file of the base at smaller inputs, by size as it is shown."""


def reduced_inputs(bench: Bench, base: Path, directory: Path, hint: str) -> Reduced:
    """The smaller inputs of the space at which the base loses at most `REDUCED_LOSS` AP on select.

    Args:
        bench: of the study.
        base: the base's float32 file.
        directory: where files of other sizes go.
        hint: precision that they are scored in.
    """
    if bench.sites.input is None:
        return {}
    at_full = _score(bench, base, hint)
    found = {}
    for height, width in bench.sites.input.smaller:
        recipe = Recipe(detector=bench.detector.name, choices=(Resize(height=height, width=width),))
        small, shown = bench.at(recipe), shown_size((height, width))
        folder = directory / shown
        file = folder / bench.target.model_file
        if not file.exists():
            small.export(small.base, {}, recipe, folder)
        if at_full - _score(small, file, hint) <= REDUCED_LOSS:
            found[shown] = small, file
    return found


def smallest(reduced: Reduced) -> tuple[str, tuple[Bench, Path]]:
    """The one of fewest pixels, with its size as it is shown."""
    return min(reduced.items(), key=lambda item: _pixels(item[1][0]))


def _score(bench: Bench, file: Path, hint: str) -> float:
    """AP on select, 0..100."""
    session = bench.target.prepare(file, bench.config.threads, hint)
    return bench.scored(session)[0]["map"]


def _pixels(bench: Bench) -> int:
    height, width = bench.detector.preprocess.size
    return height * width
