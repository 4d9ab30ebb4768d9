"""The base as users reduce it without training it, where the search may choose so too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from evaluators.bench import Bench
from evaluators.exported import ModelCard
from spaces.apply import apply
from spaces.inputs import shown_size
from spaces.methods.registry import METHODS
from spaces.recipe import AnyChoice, Proposals, Recipe, Resize, TopK

REDUCED_LOSS = 1.0
"""AP that the base may lose on select by what makes a peer."""

Reduced = dict[str, tuple[Bench, Path]]
"""Bench and float32 file of the base at smaller inputs, with fewer regions or boxes, as they are shown."""


def reduced_inputs(bench: Bench, base: Path, directory: Path, hint: str) -> Reduced:
    """What the space offers of it, as far as the base loses at most `REDUCED_LOSS` AP on select.

    Each size is there with all regions and boxes, and with the fewest that alone cost no more.

    Args:
        bench: of the study.
        base: the base's float32 file.
        directory: where other files go.
        hint: precision that they are scored in.
    """
    at_full = _score(bench, base, hint)

    def kept(*choices: AnyChoice) -> Reduced:
        recipe = Recipe(detector=bench.detector.name, choices=choices)
        small, shown = bench.at(recipe), ", ".join(_shown(recipe))
        folder = directory / shown.replace(",", "").replace(" ", "-")
        file = folder / bench.target.model_file
        if not file.exists():
            small.export(apply(small.base, recipe, small.sites).network, {}, recipe, folder)
        return {shown: (small, file)} if at_full - _score(small, file, hint) <= REDUCED_LOSS else {}

    found: Reduced = {}
    sizes = _smaller(bench, "resize")
    for size in sizes:
        found |= kept(size)
    fewest = []
    for kind in ("proposals", "topk"):
        for choice in reversed(_smaller(bench, kind)):
            if alone := kept(choice):
                found |= alone
                fewest.append(choice)
                break
    for size in sizes if fewest else ():
        found |= kept(size, *fewest)
    return found | (kept(*fewest) if len(fewest) > 1 else {})


def _smaller(bench: Bench, kind: str) -> tuple[AnyChoice, ...]:
    """What a space with the one site of this kind offers beside the study's own, mildest first."""
    return next(iter(METHODS[kind].options(bench.sites, bench.capabilities).values()), ())[1:]


def _shown(recipe: Recipe) -> Iterator[str]:
    for size in recipe.of_kind(Resize).values():
        yield shown_size(size.size)
    for regions in recipe.of_kind(Proposals).values():
        yield f"{regions.share:.3g} of the proposals"
    for boxes in recipe.of_kind(TopK).values():
        yield f"top-k {boxes.count}"


def smallest(reduced: Reduced) -> tuple[str, tuple[Bench, Path]]:
    """The one of fewest pixels and, of several such, of fewest boxes, with how it is shown."""
    return min(reduced.items(), key=lambda item: (_pixels(item[1][0]), _boxes(item[1][1])))


def _score(bench: Bench, file: Path, hint: str) -> float:
    """AP on select, 0..100."""
    session = bench.target.prepare(file, bench.config.threads, hint)
    return bench.scored(session)[0]["map"]


def _pixels(bench: Bench) -> int:
    height, width = bench.detector.preprocess.size
    return height * width


def _boxes(file: Path) -> int:
    return ModelCard.beside(file).postprocess.pre_nms_topk
