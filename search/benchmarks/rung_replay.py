"""What rungs would have saved: trained candidates met again in random orders, stopped by the rule or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluators.ranking import hypervolume
from search.benchmarks.reports import rank_correlation, table, write
from search.config import KEEP
from search.knowledge import figures_of
from search.rungs import COMPANY, goes_on, order
from search.study import SearchStudy
from search.trials import rung_figures
from spaces.errors import InputError

REFERENCE_LOSS = 15.0
"""AP points below the base at which the hypervolume ends; in latency it ends at the base's."""
LEAST = 16
SHARES = (KEEP, 0.67, 0.8)
"""Shares of a rung that go on, compared in the report."""


@dataclass(frozen=True)
class Trained:
    """Candidates that were trained to the end and looked at on the way.

    Attributes:
        epochs: of the whole training.
        rungs: R epochs of the rungs, ascending.
        at_rung: `(N, R)` mAP there.
        ratio: `(N,)` latency over the base's, measured: a study predicts it, with an error.
        map: `(N,)` at the end.
        base_map: of the base.
    """

    epochs: int
    rungs: tuple[int, ...]
    at_rung: NDArray[np.float64]
    ratio: NDArray[np.float64]
    map: NDArray[np.float64]
    base_map: float

    def volume(self, chosen: NDArray[np.bool_]) -> float:
        """Hypervolume of the base and the chosen candidates."""
        points = [(-self.base_map, 1.0), *zip(-self.map[chosen], self.ratio[chosen], strict=True)]
        # A little beyond the base's latency, or the base itself would add nothing.
        return hypervolume(points, (-(self.base_map - REFERENCE_LOSS), 1.0 + 1e-9))


@dataclass(frozen=True)
class Saved:
    """What a rule came to in each of K orders.

    Attributes:
        trained: `(K,)` epochs that were trained, over those without rungs.
        kept: `(K,)` hypervolume of what was trained to the end, over that of all.
        plain: `(K,)` the same of as many candidates, the first ones, as that training trains without rungs.
    """

    trained: NDArray[np.float64]
    kept: NDArray[np.float64]
    plain: NDArray[np.float64]


def trained_in(study: SearchStudy, epochs: int, base_map: float) -> Trained:
    """The candidates of a study that have figures at every rung and at the end.

    Raises:
        InputError: too few; such a study is made with `search.keep: 1`.
    """
    found = [(rung_figures(t), figures_of(t)) for t in study.optuna.get_trials(deepcopy=False)]
    whole = [(rungs, figures) for rungs, figures in found if rungs and figures is not None]
    every = tuple(sorted({epoch for rungs, _ in whole for epoch in rungs}))
    rows = [(rungs, figures) for rungs, figures in whole if set(rungs) == set(every)]
    if len(rows) < LEAST:
        raise InputError(
            "study",
            study.name,
            f"has {len(rows)} candidates that passed all rungs, {LEAST} are needed; "
            "search with rungs: true and keep: 1, which stops nobody",
        )
    ends = np.array([figures for _, figures in rows], float)
    at_rung = np.array([[rungs[epoch]["map"] for epoch in every] for rungs, _ in rows])
    return Trained(epochs, every, at_rung, ends[:, 1], ends[:, 0], base_map)


def replay(
    trained: Trained,
    rungs: Sequence[int],
    keep: float = KEEP,
    company: int = COMPANY,
    orders: int = 50,
    seed: int = 0,
) -> Saved:
    """Let the candidates come one after another, in random orders.

    Args:
        trained: the candidates.
        rungs: epochs of the rungs that are looked at, among those of `trained`.
        keep, company: of the rule.
        orders: how many.
        seed: of the orders.
    """
    random = np.random.default_rng(seed)
    count, all_of_them = len(trained.map), trained.volume(np.ones(len(trained.map), bool))
    columns = [trained.rungs.index(epoch) for epoch in rungs]
    best = np.maximum.accumulate(trained.at_rung[:, columns], axis=1)  # as `search.trials.rung_maps`
    spent, kept, plain = np.zeros(orders), np.zeros(orders), np.zeros(orders)
    for k in range(orders):
        survived = np.zeros(count, bool)
        came: dict[int, list[int]] = {epoch: [] for epoch in rungs}
        turn = random.permutation(count)
        for candidate in turn:
            stopped = _stopped_at(best, trained.ratio, candidate, came, keep, company)
            survived[candidate] = stopped is None
            spent[k] += trained.epochs if stopped is None else stopped
        spent[k] /= trained.epochs * count
        kept[k] = trained.volume(survived) / all_of_them
        first = np.isin(np.arange(count), turn[: round(spent[k] * count)])
        plain[k] = trained.volume(first) / all_of_them
    return Saved(spent, kept, plain)


def _stopped_at(
    best: NDArray[np.float64],
    ratio: NDArray[np.float64],
    candidate: int,
    came: dict[int, list[int]],
    keep: float,
    company: int,
) -> int | None:
    """The rung at which a candidate is stopped; it is added to those that came there."""
    for column, (epoch, others) in enumerate(came.items()):
        others.append(candidate)
        points = np.stack([-best[others, column], ratio[others]], axis=1)
        place = 1 if len(others) < company else order(points).index(len(others) - 1) + 1
        if not goes_on(place, len(others), keep, company):
            return epoch
    return None


def write_replay(
    file: Path, title: str, trained: Trained, facts: Mapping[str, Any], orders: int = 50
) -> None:
    """Write the report: each rung alone and all of them, for several shares that go on."""
    sets = [*[(epoch,) for epoch in trained.rungs], trained.rungs]
    rows: list[list[object]] = []
    raw: list[dict[str, Any]] = []
    for rungs in dict.fromkeys(sets):
        for keep in SHARES:
            saved = replay(trained, rungs, keep, orders=orders)
            rows.append(
                [
                    ", ".join(map(str, rungs)),
                    f"{keep:.0%}",
                    _shown(saved.trained),
                    _shown(saved.kept),
                    _shown(saved.plain),
                ]
            )
            raw.append(
                {
                    "rungs": rungs,
                    "keep": keep,
                    "trained": list(saved.trained),
                    "kept": list(saved.kept),
                    "plain": list(saved.plain),
                }
            )
    best = np.maximum.accumulate(trained.at_rung, axis=1)
    correlations = {
        epoch: (
            rank_correlation(trained.at_rung[:, k], trained.map),
            rank_correlation(best[:, k], trained.map),
        )
        for k, epoch in enumerate(trained.rungs)
    }
    said = ", ".join(f"{there:.2f} after {epoch}" for epoch, (there, _) in correlations.items())
    best_said = ", ".join(f"{up_to:.2f} after {epoch}" for epoch, (_, up_to) in correlations.items())
    lines = [
        f"{len(trained.map)} candidates, each trained for {trained.epochs} epochs. Rank correlation of mAP "
        f"at a rung (epochs) with mAP at the end: {said}; of the best mAP up to a rung, by which candidates "
        f"are compared: {best_said}.",
        "",
        f"They come one after another in {orders} random orders and are stopped or not by the rule of a "
        "search. Training is epochs over those without rungs; hypervolume (to 15 AP below the base, latency "
        "by ratio) is that of the candidates trained to the end over that of all. Beside it that of the "
        "first candidates where none is stopped, as many as the same training trains. Medians with 95 % of "
        "the orders.",
        "",
        *table(["rungs", "go on", "training", "hypervolume", "without rungs, as much training"], rows),
    ]
    write(file, title, lines, {"replays": raw, "correlations": correlations}, facts)


def _shown(values: NDArray[np.float64]) -> str:
    low, middle, high = np.percentile(values, (2.5, 50, 97.5))
    return f"{middle:.1%} ({low:.1%} to {high:.1%})"
