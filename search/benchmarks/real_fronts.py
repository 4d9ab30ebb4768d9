"""Fronts that samplers found on a surrogate, evaluated for real: whether what was compared is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from search.benchmarks.contenders import CONTENDERS, known_from
from search.benchmarks.recorded import Recorded, decoded, encoded, require_its_problem
from search.benchmarks.replay import normalised_volume, replay
from search.benchmarks.reports import table, write
from search.benchmarks.surrogate import Surrogate
from search.knowledge import finished_trials
from search.study import SearchStudy
from spaces.table import SpaceTable

STORED = "fronts"
"""Study attribute: what is evaluated there."""
ORIGIN = "front of a replay"
MOST = 8
"""Recipes of a front that are evaluated: those that together keep the most of its hypervolume."""

Point = tuple[float, float]
"""AP lost, and latency over the base's."""


@dataclass(frozen=True)
class ReplayedFront:
    """What a contender found on the surrogate.

    Attributes:
        sampler: of `CONTENDERS`.
        seed: of the replay.
        recipes: as `Recorded` writes them, at most `MOST`.
        predicted: normalised hypervolume of these by the surrogate.
        whole: that of all trials of the replay.
    """

    sampler: str
    seed: int
    recipes: tuple[str, ...]
    predicted: float
    whole: float


def replayed_fronts(
    recorded: Recorded, samplers: Sequence[str], seeds: int, trials: int, say: Callable[[str], None]
) -> list[ReplayedFront]:
    """Replay each sampler with `seeds` seeds, and thin out its front.

    Args:
        say: takes a line at a time.
    """
    space = recorded.table()
    surrogate = Surrogate(recorded, space)
    known = known_from(recorded, space)
    fronts = []
    for name in samplers:
        for seed in range(seeds):
            asked, volumes = replay(CONTENDERS[name], known, surrogate, trials, seed)
            quality, ratio = surrogate(np.stack(asked))
            points = list(zip((surrogate.base_map - quality).tolist(), ratio.tolist(), strict=True))
            kept = thinned(points, MOST)
            codes = [encoded(asked[k][None])[0] for k in kept]
            predicted = normalised_volume([points[k] for k in kept])
            fronts.append(ReplayedFront(name, seed, tuple(codes), predicted, float(volumes[-1])))
            say(f"{name}, seed {seed}: {len(kept)} recipes with {predicted:.4f} of {volumes[-1]:.4f}")
    return fronts


def thinned(points: Sequence[Point], count: int) -> list[int]:
    """At most `count` of the points, one after another whichever adds the most hypervolume."""
    kept: list[int] = []
    while len(kept) < count:
        held = [points[k] for k in kept]
        volume = normalised_volume(held)
        gains = [normalised_volume([*held, point]) - volume for point in points]
        best = int(np.argmax(gains))
        if gains[best] <= 0:
            break
        kept.append(best)
    return kept


def enqueue(study: SearchStudy, recorded: Recorded, fronts: Sequence[ReplayedFront]) -> int:
    """Put the base and all recipes of the fronts, each once, into a study that has no trials.

    Returns:
        The number of trials that it has to run.

    Raises:
        InputError: it is of another problem than the recorded recipes.
    """
    require_its_problem(study, recorded)
    space = recorded.table()
    study.optuna.set_user_attr(STORED, [asdict(front) for front in fronts])
    study.optuna.enqueue_trial(space.space.identity_params())
    codes = list(dict.fromkeys(code for front in fronts for code in front.recipes))
    for options in decoded(codes):
        if options.any():
            study.optuna.enqueue_trial(space.params(options), user_attrs={"origin": ORIGIN})
    return len(study.optuna.get_trials(deepcopy=False))


def stored_fronts(study: SearchStudy) -> list[ReplayedFront]:
    """What `enqueue` put there; nothing where it was not called."""
    found = study.optuna.user_attrs.get(STORED, [])
    return [ReplayedFront(**{**one, "recipes": tuple(one["recipes"])}) for one in found]


@dataclass(frozen=True)
class Confirmed:
    """A front beside what it really is.

    Attributes:
        front: as replayed.
        real: normalised hypervolume of the recipes as they were evaluated.
        found: number of them that were evaluated; failed ones were not.
    """

    front: ReplayedFront
    real: float
    found: int


def confirmed(study: SearchStudy, space: SpaceTable, base_map: float) -> list[Confirmed]:
    """Every front of a study with the hypervolume that its recipes really have.

    Args:
        base_map: of the base on select, AP in 0..100, as the recorded recipes have it.
    """
    finished = finished_trials(space, study.optuna.get_trials(deepcopy=False))
    lost = (base_map - finished.map).tolist()
    figures = zip(lost, finished.ratio.tolist(), strict=True)
    points = dict(zip(encoded(finished.options), figures, strict=True))
    rows = []
    for front in stored_fronts(study):
        held = [points[code] for code in front.recipes if code in points]
        rows.append(Confirmed(front, normalised_volume(held), len(held)))
    return rows


def write_confirmed(
    file: Path, recorded: Recorded, rows: Sequence[Confirmed], facts: Mapping[str, Any]
) -> None:
    """Write the report as Markdown, and the recipes of every front as JSON beside it."""
    lines = [
        "What samplers found on the surrogate, thinned out to "
        f"{MOST} recipes each, and really evaluated. Normalised hypervolume; 1 = no loss in no time.",
        "",
        *table(
            ["sampler", "seed", "whole replay", "its recipes, surrogate", "evaluated", "the same"],
            [
                [
                    row.front.sampler,
                    row.front.seed,
                    f"{row.front.whole:.4f}",
                    f"{row.front.predicted:.4f}",
                    f"{row.real:.4f}",
                    f"{row.found} of {len(row.front.recipes)}",
                ]
                for row in rows
            ],
        ),
    ]
    content = {"fronts": [asdict(row) for row in rows], "conditions": recorded.conditions}
    write(file, "Fronts of replayed samplers, evaluated", lines, content, facts)
