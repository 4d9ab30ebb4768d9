"""Random recipes, exported without training and timed: what latency models and rooflines are tried on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluators.bench import Bench
from evaluators.finetune import fine_tune
from evaluators.latency import PairedLatency
from evaluators.latency_model import LatencyModel
from evaluators.qat import as_plain, fake_quantized
from evaluators.targets.base import Session
from search.strategy import probe_recipes
from spaces.apply import apply
from spaces.effects import bits_by_layer
from spaces.layers import learning
from spaces.methods.base import Draft
from spaces.recipe import Recipe
from spaces.table import Options, SpaceTable

POOL = 600
RANGE = 4.0
"""Slowest over fastest of the recipes that a model is tested on."""


@dataclass(frozen=True)
class Exported:
    """A recipe's file, loaded.

    Attributes:
        recipe: what was done to the base.
        file: in the form of the bench's target.
        session: that serves it.
        packed: bits that a weight takes in the file, of the layers that are packed.
    """

    recipe: Recipe
    file: Path
    session: Session
    packed: Mapping[str, int] = field(default_factory=dict)


def exported(bench: Bench, recipe: Recipe, folder: Path, trained: bool = False) -> Exported:
    """Carry a recipe out on the base and load the file.

    Nothing is trained, unless `trained` asks for the configuration's fine-tuning with integer layers that
    round, of a recipe that changes nothing but bit-widths.
    """
    with bench.slot.computing():
        bench = bench.at(recipe)
        draft = apply(bench.base, recipe, bench.sites)  # which channels go makes no difference to the time
    if trained:
        _train_rounded(bench, draft, recipe)
    with bench.slot.computing():
        file, card = bench.export(
            draft.network, bits_by_layer(recipe, bench.sites), recipe, folder, draft.learned
        )
        session = bench.target.prepare(file, bench.config.threads, card.runtime.hint)
    return Exported(recipe, file, session, card.packed)


def _train_rounded(bench: Bench, draft: Draft, recipe: Recipe) -> None:
    network, config = learning(draft.network, bench.frozen), bench.config
    with bench.slot.computing():
        fake = fake_quantized(bench, draft, recipe)
    plan = config.finetune
    rest = (bench.fit, bench.teacher, plan, bench.slot, config.seed)
    for _ in fine_tune(network, bench.detector, *rest, norms_measured=True):
        pass
    draft.learned = as_plain(fake.removed())


def measured(
    bench: Bench, recipes: Sequence[Recipe], folder: Path, say: Callable[[str], None]
) -> Iterator[tuple[Exported, PairedLatency]]:
    """Each recipe with its latency, one after another; files stay until the next one is asked for."""
    base = exported(bench, bench.identity, folder / "base").session
    for count, recipe in enumerate(recipes, start=1):
        made = exported(bench, recipe, folder / "recipe")
        found = bench.at(recipe).timed(made.session, base)
        say(f"  {count}/{len(recipes)}: {found.ratio:.3f} [{found.low:.3f}, {found.high:.3f}]")
        yield made, found


def options_of(table: SpaceTable, recipes: Sequence[Recipe]) -> Options:
    """Positions `(N, P)` of recipes in a space."""
    return table.options([table.space.params(recipe) for recipe in recipes])


def unseen_recipes(
    table: SpaceTable, model: LatencyModel, count: int, seed: int, seen: Sequence[Recipe]
) -> list[Recipe]:
    """Recipes that a model was not fitted on, spread evenly over a range of latencies.

    Of a pool of random ones, half of them at one bit-width and half of mixed precision, those are taken
    that lie nearest to even steps of the logarithm of the predicted ratio, from the base's down to
    1 / `RANGE` of it. Where the pool does not go as far down, the steps begin above the base, `RANGE` over
    the fastest.
    """
    known = {recipe.key for recipe in seen}
    pool = [recipe for recipe in probe_recipes(table, POOL, seed) if recipe.key not in known]
    pool = list({recipe.key: recipe for recipe in pool}.values())
    options = options_of(table, pool)
    kinds = table.shapes(options).bits
    mixed = np.array([len(set(row)) > 1 for row in kinds.tolist()])
    predicted = np.log(model.predict(options))
    picked: list[int] = []
    halves = [np.flatnonzero(mixed), np.flatnonzero(~mixed)]
    sizes = [count // 2, count - count // 2]
    for places, size in zip(halves, sizes, strict=True):
        picked += _nearest_to_steps(predicted, places, size)
    return [pool[k] for k in picked]


def _nearest_to_steps(values: NDArray[np.float64], places: NDArray[np.int64], count: int) -> list[int]:
    """`count` of the places whose values lie nearest to even steps, none twice."""
    if not len(places):
        return []
    lowest = max(float(values[places].min()), -np.log(RANGE))
    highest = min(float(values[places].max()), lowest + np.log(RANGE))
    free, picked = list(places), []
    for step in np.linspace(highest, lowest, count):
        if free:
            best = min(free, key=lambda k: abs(values[k] - step))
            free.remove(best)
            picked.append(int(best))
    return picked
