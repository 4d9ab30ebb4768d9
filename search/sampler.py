"""An Optuna sampler that solves for the front it expects, and corrects itself by what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial

from evaluators.evaluation import Evaluation
from evaluators.latency_model import LatencyModel
from evaluators.ranking import Problem, front
from search.experience import Experience, ExperienceReader, believed_loss
from search.failures import chances
from search.improvement import Reached
from search.judge import allowed_loss
from search.knowledge import Finished
from search.linear_algebra import on_one_thread
from search.loss_model import LossModel
from search.seeds import uniform_starts
from search.solver import damage_path
from spaces.table import SpaceTable

PERTURBATION = 0.35
"""Standard deviation of the logarithm by which each parameter's predicted loss is perturbed."""
MUTATIONS = 0.4
"""Share of proposals that mutate a member of the front; the others are solved for."""
MUTANTS = 16
"""Of which the most promising is proposed."""
ATTEMPTS = 40
"""At a proposal that differs from all there are; a small space may have none left."""
LARGEST_LOSS = 6.0
"""AP points that are worth looking at where no limit says less."""
UNTOLD = 0.25
"""AP points that count as no loss: a hundred images cannot show so little. Else, where nothing is quite as
good as the base, proposals crowd between it and what is nearly as good."""
SMALLEST_LOSS = 2 * UNTOLD
"""AP points that are looked at whatever the limits are: who allows no loss wants what may turn out to lose
none, and no prediction is that sure."""


class FrontSampler(BaseSampler):
    """Proposes recipes by solver and by mutation of the front.

    Every proposal perturbs each parameter's predicted loss (Thompson sampling: Thompson 1933, Biometrika 25)
    and takes what would add most to the front if that were so (after Bradford, Schweidtmann and Lapkin 2018,
    J. Glob. Optim. 71): of all that the solver finds between mild and strong, or of some front members with a
    few parameters moved by one step each. Its state is the study alone: predicted losses and latencies are
    fitted anew from the finished trials, so resumed studies and several drivers need nothing more. Trials
    that run count with their predicted figures, so that the places where they will be do not look empty;
    trials that were stopped at a rung count with the mAP that they would have ended with.

    Args:
        table: of the space.
        damage: `(P, O)` damage of single options, see `search.sensitivity`.
        relearn: makes the model of latency of probes and the finished trials, called before each proposal.
        problem: proposals expected to lose more mAP than its limits allow are not made.
        seed: of everything random.
        mutations: share of proposals that mutate a member of the front; the others are solved for.
    """

    def __init__(
        self,
        table: SpaceTable,
        damage: NDArray[np.float64],
        relearn: Callable[[Finished], LatencyModel],
        problem: Problem | None = None,
        seed: int | None = None,
        mutations: float = MUTATIONS,
    ) -> None:
        self._table, self._damage, self._relearn = table, damage, relearn
        self._problem, self._mutations = problem or Problem(), mutations
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
        with on_one_thread():
            return self._table.params(self._new(experience))

    def _new(self, experience: Experience) -> NDArray[np.int64]:
        view = self._view(experience)
        for attempt in range(ATTEMPTS):
            solved_enough = attempt >= ATTEMPTS // 4  # what the solver says here was done already
            if solved_enough or (self._random.random() < self._mutations and len(view.measured) > 2):
                options = self._mutated(view)
            else:
                options = self._solved(view)
            if options.tobytes() not in experience.taken:
                break
        return options

    def _view(self, experience: Experience) -> _View:
        finished = experience.finished
        believed, base_map = believed_loss(self._table, self._damage, experience)
        model = self._relearn(finished)
        measured = np.stack([base_map - finished.map, finished.ratio], axis=1)
        predicted = np.stack([believed.of(experience.pending), model.predict(experience.pending)], axis=1)
        largest = self._largest_loss(experience.base)
        parents = [k for k in front(measured) if finished.map.max() - finished.map[k] <= largest]
        together = np.concatenate([measured, predicted])
        there = [k for k in front(together) if k in parents or k >= len(measured)]
        areas = own_areas(together[there])
        area = dict(zip(there, areas, strict=True))
        parents = [k for k in parents if k in area] or parents
        shares = np.array([area.get(k, 1.0) for k in parents])
        reached = Reached(together[:, 0], together[:, 1], largest, min(UNTOLD, largest / 4))
        usable = LossModel(believed.damage, np.where(self._broken(experience), np.inf, believed.loss))
        return _View(
            measured, finished.options, usable, model, largest, reached, parents, shares / shares.sum()
        )

    def _broken(self, experience: Experience) -> NDArray[np.bool_]:
        """Options `(P, O)` that do not work in this proposal, drawn by what failed."""
        if not len(experience.failed):
            return np.zeros(self._damage.shape, bool)
        worked = np.concatenate([experience.finished.options, experience.stopped])
        chance = chances(worked, experience.failed, self._damage.shape[1])
        broken: NDArray[np.bool_] = self._random.random(chance.shape) >= chance
        return broken

    def _largest_loss(self, base: Evaluation | None) -> float:
        """AP points below the trained base that proposals may be expected to lose."""
        allowed = self._problem.allowed_loss(math.inf) if base is None else allowed_loss(self._problem, base)
        return max(allowed, SMALLEST_LOSS) if math.isfinite(allowed) else LARGEST_LOSS

    def _drawn(self, view: _View) -> LossModel:
        """What losses may be as well: each parameter's perturbed."""
        noise = np.exp(self._random.normal(0.0, PERTURBATION, size=(len(self._table.names), 1)))
        return LossModel(view.believed.damage, view.believed.loss * noise)

    def _solved(self, view: _View) -> NDArray[np.int64]:
        path = damage_path(self._drawn(view).loss, view.model, self.starts(), limit=view.largest_loss)
        if not path:
            return self._mutated(view)
        losses = np.array([point.damage for point in path])
        ratios = np.array([point.latency for point in path])
        return path[int(view.reached.added(losses, ratios).argmax())].options

    def _mutated(self, view: _View) -> NDArray[np.int64]:
        """The most promising of some front members with a few parameters moved by one step.

        Members are drawn by the area that they alone dominate, so that a crowd of near-equal ones has no
        more say than the point that stands for it. What a step costs and saves is predicted, all else is
        what was measured of the member.
        """
        members = self._random.choice(view.parents, size=MUTANTS, p=view.shares)
        parents = view.options[members]
        mutants = parents.copy()
        for mutant in mutants:
            for p in self._random.choice(len(mutant), size=1 + self._random.poisson(2.0), replace=True):
                mutant[p] = np.clip(mutant[p] + self._random.choice([-1, 1]), 0, self._table.sizes[p] - 1)
        drawn = self._drawn(view)
        losses = view.measured[members, 0] + drawn.of(mutants) - drawn.of(parents)
        unknown = np.isinf(drawn.loss[np.arange(len(drawn.loss)), mutants]) & (mutants != parents)
        losses[unknown.any(axis=1)] = np.inf
        ratios = view.measured[members, 1] * view.model.predict(mutants) / view.model.predict(parents)
        best: NDArray[np.int64] = mutants[int(view.reached.added(losses, ratios).argmax())]
        return best

    def starts(self) -> list[NDArray[np.int64]]:
        """Where the solver begins: the base, and every bit-width used everywhere."""
        return uniform_starts(self._table)


@dataclass(frozen=True)
class _View:
    """What is believed when a candidate is asked for.

    Attributes:
        measured: `(N, 2)` AP points lost and latency over the base's of the evaluated trials.
        options: `(N, P)` of these.
        believed: losses of mAP.
        model: of latency.
        largest_loss: AP points that a proposal may be expected to lose.
        reached: by them, and by those under way as they are predicted.
        parents: indices of the finished trials that may be mutated: those of the front.
        shares: how often each of them is.
    """

    measured: NDArray[np.float64]
    options: NDArray[np.int64]
    believed: LossModel
    model: LatencyModel
    largest_loss: float
    reached: Reached
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
