"""The base as users reduce it without training it, where the search may choose so too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from evaluators.bench import Bench
from evaluators.exported import ModelCard
from search.peers.models import PeerModel
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


def with_smallest(
    make: Callable[[Bench, Path, Path], list[PeerModel]],
    bench: Bench,
    base: Path,
    directory: Path,
    reduced: Reduced,
) -> list[PeerModel]:
    """What somebody's package makes of the base, and of the one reduced the most.

    That is the one of fewest pixels, then of fewest boxes, then of fewest proposals.

    Args:
        make: takes a bench, a float32 file and the directory that the made ones go to.
        bench: of the study.
        base: the base's float32 file.
        directory: where the files of the base go; the others lie beside the reduced one.
        reduced: of `reduced_inputs`.
    """
    peers = make(bench, base, directory)
    if reduced:
        shown, (small, file) = min(reduced.items(), key=lambda item: _measure(*item[1]))
        small_ones = make(small, file, file.parent)
        peers += [replace(peer, name=f"{peer.name}, {shown}") for peer in small_ones]
    return peers


def _score(bench: Bench, file: Path, hint: str) -> float:
    """AP on select, 0..100."""
    session = bench.target.prepare(file, bench.config.threads, hint)
    return bench.scored(session)[0]["map"]


def _measure(bench: Bench, file: Path) -> tuple[int, int, float]:
    card = ModelCard.beside(file)
    shares = [regions.share for regions in card.recipe.of_kind(Proposals).values()]
    return math.prod(bench.detector.preprocess.size), card.postprocess.pre_nms_topk, min(shares, default=1.0)
