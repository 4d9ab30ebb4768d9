"""An Optuna sampler that solves for the front it expects, and corrects itself by what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial

from evaluators.latency_model import LatencyModel
from evaluators.ranking import front
from search.experience import Experience, ExperienceReader, believed_loss
from search.knowledge import Finished
from search.seeds import uniform_starts
from search.solver import damage_path
from spaces.table import SpaceTable

PERTURBATION = 0.35
"""Standard deviation of the logarithm by which each parameter's predicted loss is perturbed."""
MUTATIONS = 0.4
"""Share of proposals that mutate a member of the front; the others are solved for."""
ATTEMPTS = 40
"""At a proposal that differs from all there are; a small space may have none left."""
LARGEST_LOSS = 6.0
"""AP points that are worth looking at where no limit says less."""


class FrontSampler(BaseSampler):
    """Proposes recipes by solver and by mutation of the front.

    A proposal by solver perturbs every parameter's predicted loss (Thompson sampling: Thompson 1933,
    Biometrika 25), draws the loss it is willing to pay, and takes the fastest recipe within it. A
    proposal by mutation changes a few parameters of a measured front member by one step each. Its state
    is the study alone: predicted losses and latencies are fitted anew from the finished trials, so
    resumed studies and several drivers need nothing more. Trials that run count with their predicted
    figures, so that the places where they will be do not look empty; trials that were stopped at a rung
    count with the mAP that they would have ended with.

    Args:
        table: of the space.
        damage: `(P, O)` damage of single options, see `search.sensitivity`.
        latency: the model fitted on probes, refitted with the trials by `relearn`.
        relearn: called with the finished trials before each proposal.
        largest_loss: AP points; proposals expected to lose more are not made.
        seed: of everything random.
        mutations: share of proposals that mutate a member of the front; the others are solved for.
    """

    def __init__(
        self,
        table: SpaceTable,
        damage: NDArray[np.float64],
        relearn: Callable[[Finished], LatencyModel],
        largest_loss: float = LARGEST_LOSS,
        seed: int | None = None,
        mutations: float = MUTATIONS,
    ) -> None:
        self._table, self._damage, self._relearn = table, damage, relearn
        self._largest_loss, self._mutations = largest_loss, mutations
        self._random = np.random.default_rng(seed)
        self._fallback = RandomSampler(seed=seed)
        self._reader = ExperienceReader(table)

    def reseed_rng(self) -> None:
        """Called by Optuna where one sampler is used by several processes."""
        self._random = np.random.default_rng()
        self._fallback.reseed_rng()

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The whole space, always: parameters are never conditional."""
        return self._table.space.distributions()

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A random value, for parameters that are not of the space."""
        return self._fallback.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """One proposal that no finished or running trial has made."""
        experience = self._reader.read(study.get_trials(deepcopy=False))
        if not len(experience.finished.map):
            return {}
        view = self._view(experience)
        for attempt in range(ATTEMPTS):
            solved_enough = attempt >= ATTEMPTS // 4  # what the solver says here was done already
            if solved_enough or (self._random.random() < self._mutations and len(view.finished.map) > 2):
                options = self._mutated(view)
            else:
                options = self._solved(view)
            if options.tobytes() not in experience.taken:
                break
        return self._table.params(options)

    def _view(self, experience: Experience) -> _View:
        finished, rows = experience.finished, np.arange(len(self._table.names))
        believed, base_map = believed_loss(self._table, self._damage, experience)
        loss = believed.loss
        model = self._relearn(finished)
        measured = np.stack([-finished.map, finished.ratio], axis=1)
        predicted = np.stack(
            [loss[rows, experience.pending].sum(axis=1) - base_map, model.predict(experience.pending)], axis=1
        )
        parents = [k for k in front(measured) if finished.map.max() - finished.map[k] <= self._largest_loss]
        together = np.concatenate([measured, predicted])
        there = [k for k in front(together) if k in parents or k >= len(measured)]
        areas = own_areas(together[there])
        area = dict(zip(there, areas, strict=True))
        parents = [k for k in parents if k in area] or parents
        shares = np.array([area.get(k, 1.0) for k in parents])
        return _View(finished, loss, model, parents, shares / shares.sum())

    def _solved(self, view: _View) -> NDArray[np.int64]:
        noise = np.exp(self._random.normal(0.0, PERTURBATION, size=(len(view.loss), 1)))
        # Cubed, so that small losses, which people want most, are looked at more often.
        willing = self._largest_loss * self._random.random() ** 3
        path = damage_path(view.loss * noise, view.model, self.starts(), limit=willing)
        return path[-1].options if path else self._mutated(view)

    def _mutated(self, view: _View) -> NDArray[np.int64]:
        """A front member with a few parameters moved by one step.

        Members are drawn by the area that they alone dominate, so that a crowd of near-equal ones has no
        more say than the point that stands for it.
        """
        parent = view.finished.options[self._random.choice(view.parents, p=view.shares)].copy()
        sizes = self._table.sizes
        for p in self._random.choice(len(parent), size=1 + self._random.poisson(2.0), replace=True):
            step = self._random.choice([-1, 1])
            parent[p] = np.clip(parent[p] + step, 0, sizes[p] - 1)
        mutated: NDArray[np.int64] = parent
        return mutated

    def starts(self) -> list[NDArray[np.int64]]:
        """Where the solver begins: the base, and every bit-width used everywhere."""
        return uniform_starts(self._table)


@dataclass(frozen=True)
class _View:
    """What is believed when a candidate is asked for.

    Attributes:
        finished: evaluated trials.
        loss: `(P, O)` predicted loss of mAP of each option.
        model: of latency.
        parents: indices of the finished trials that may be mutated: those of the front.
        shares: how often each of them is.
    """

    finished: Finished
    loss: NDArray[np.float64]
    model: LatencyModel
    parents: list[int]
    shares: NDArray[np.float64]


def own_areas(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Area `(K,)` that each of K points `(K, 2)` of a front dominates alone; never 0."""
    corner = points.max(axis=0) + np.array([1.0, 0.05])
    order = np.argsort(points[:, 0])
    sorted_points = points[order]
    left = np.append(sorted_points[1:, 0], corner[0]) - sorted_points[:, 0]
    below = np.insert(sorted_points[:-1, 1], 0, corner[1]) - sorted_points[:, 1]
    areas = np.empty(len(points))
    areas[order] = np.maximum(left * below, 1e-6)
    return areas
