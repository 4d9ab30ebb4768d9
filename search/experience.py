"""What a sampler reads out of a study's trials: what was measured, what was stopped, what is under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState

from evaluators.evaluation import Evaluation
from search.judge import reference_of
from search.knowledge import Finished, Positions, figures_of
from search.loss_model import LossModel, fit_loss
from search.trials import DUPLICATE_OF, counts, evaluation_of, rung_maps
from spaces.table import Options

FEW = 3
"""With fewer finished trials that passed a rung, what training brings behind it is a guess."""
GUESSED_SHARE = 0.5
CENSORED = 0.5
"""Weight of a stopped trial in the fit of losses: what it would have ended with is an estimate."""


@dataclass(frozen=True)
class Experience:
    """The trials of a study, in the order of their numbers.

    Attributes:
        finished: evaluated trials, the base among them.
        passed: of each finished trial, the best mAP up to each rung that it passed, by epochs.
        stopped: positions `(S, P)` of the trials that were stopped at a rung.
        stopped_at: the same of each of them; the last rung is where it was stopped.
        pending: positions `(K, P)` of the trials that run now, or were interrupted and will go on.
        taken: positions of all trials as bytes, so that nothing is proposed twice.
        base: what was measured of it, if anything.
        failed: positions `(F, P)` of the trials that failed by themselves.
    """

    finished: Finished
    passed: Sequence[dict[int, float]]
    stopped: Options
    stopped_at: Sequence[dict[int, float]]
    pending: Options
    taken: frozenset[bytes]
    base: Evaluation | None = None
    failed: Options = field(default_factory=lambda: np.zeros((0, 0), np.int64))

    def expected_maps(self, base_map: float) -> NDArray[np.float64]:
        """mAP `(S,)` that the stopped trials would have ended with.

        A stopped trial is censored: training on would have repaired part of what it had lost. The share of
        the loss at a rung that is left at the end is the median over the finished trials that passed it.
        """
        last = [max(maps.items()) for maps in self.stopped_at]
        shares = {rung: self._share_left(rung, base_map) for rung in {rung for rung, _ in last}}
        expected = [base_map - shares[rung] * max(base_map - at_rung, 0.0) for rung, at_rung in last]
        return np.array(expected, float)

    def _share_left(self, rung: int, base_map: float) -> float:
        """Share of the loss at a rung that training on leaves."""
        shares = [
            (base_map - final) / max(base_map - passed[rung], 0.5)
            for final, passed in zip(self.finished.map, self.passed, strict=True)
            if rung in passed and base_map - passed[rung] > 0.5
        ]
        return float(np.clip(np.median(shares), 0.0, 1.0)) if len(shares) >= FEW else GUESSED_SHARE


def believed_loss(
    table: Positions, damage: NDArray[np.float64], experience: Experience
) -> tuple[LossModel, float]:
    """The model of losses fitted to finished and stopped trials, and the mAP that losses count from.

    Args:
        table: of the space.
        damage: `(P, O)` of single options.
        experience: with at least one finished trial.
    """
    finished = experience.finished
    base = experience.base
    base_map = float(finished.map.max()) if base is None else reference_of(base).metrics["map"].value
    expected = experience.expected_maps(base_map)
    known = Finished(
        np.concatenate([finished.options, experience.stopped]),
        np.concatenate([finished.map, expected]),
        np.concatenate([finished.ratio, np.full(len(expected), np.nan)]),
    )
    trust = np.concatenate([np.ones(len(finished.map)), np.full(len(expected), CENSORED)])
    return fit_loss(table, damage, known, base_map, trust), base_map


@dataclass(frozen=True)
class _Read:
    options: NDArray[np.int64]
    figures: tuple[float, float] | None
    base: Evaluation | None
    rungs: dict[int, float]


class ExperienceReader:
    """Reads trials of one study again and again, the finished ones only once.

    Finished trials never change in Optuna, nor do the parameters of one that has them all, so what was read
    of them is kept, by their ids. That saves time and nothing else: a new reader comes to the same.
    """

    def __init__(self, table: Positions) -> None:
        self._table = table
        self._names = set(table.names)
        self._known: dict[int, _Read | None] = {}
        self._under_way: dict[int, _Read] = {}

    def read(self, trials: Sequence[FrozenTrial]) -> Experience:
        """All that is known of the trials of this space; trials of others are passed over."""
        finished: list[_Read] = []
        stopped: list[_Read] = []
        pending: list[_Read] = []
        failed: list[_Read] = []
        taken: set[bytes] = set()
        for trial in trials:
            read = self._read(trial)
            if read is None:
                continue
            taken.add(read.options.tobytes())
            if not trial.state.is_finished():
                pending.append(read)
            elif trial.state == TrialState.FAIL:
                if counts(trial) and DUPLICATE_OF not in trial.user_attrs:
                    failed.append(read)
            elif trial.state == TrialState.PRUNED and read.rungs:
                stopped.append(read)
            elif read.figures is not None:
                finished.append(read)
        figures = np.array([read.figures for read in finished], float).reshape(-1, 2)
        return Experience(
            finished=Finished(self._stacked(finished), figures[:, 0], figures[:, 1]),
            passed=[read.rungs for read in finished],
            stopped=self._stacked(stopped),
            stopped_at=[read.rungs for read in stopped],
            pending=self._stacked(pending),
            taken=frozenset(taken),
            base=next((read.base for read in finished if read.base is not None), None),
            failed=self._stacked(failed),
        )

    def _stacked(self, read: list[_Read]) -> Options:
        rows = [one.options for one in read]
        return np.array(rows, np.int64).reshape(len(rows), len(self._table.names))

    def _read(self, trial: FrozenTrial) -> _Read | None:
        number = trial._trial_id
        if not trial.state.is_finished():
            if number not in self._under_way and set(trial.params) == self._names:
                self._under_way[number] = _Read(self._table.options([trial.params])[0], None, None, {})
            return self._under_way.get(number)
        if number not in self._known:
            self._known[number] = self._finished(trial)
            self._under_way.pop(number, None)
        return self._known[number]

    def _finished(self, trial: FrozenTrial) -> _Read | None:
        if set(trial.params) != self._names:
            return None
        options = self._table.options([trial.params])[0]
        figures = figures_of(trial)
        base = evaluation_of(trial) if figures is not None and not options.any() else None
        return _Read(options, figures, base, rung_maps(trial))
