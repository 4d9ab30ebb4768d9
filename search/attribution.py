"""What each choice of a trial costs and saves, by the models that the sampler proposes with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from evaluators.evaluation import Evaluation
from evaluators.latency_model import LatencyModel
from evaluators.ranking import Problem
from search.experience import ExperienceReader, believed_loss
from search.judge import (
    base_evaluation,
    gain_of_training_further,
    latency_scale,
    problem_of,
    reference_of,
)
from search.knowledge import figures_of, latency_learner, measured_damage
from search.loss_model import LossModel
from search.study import SearchStudy
from spaces.errors import InputError
from spaces.space import Value
from spaces.table import SpaceTable

REMARK = (
    "Costs and savings are attributions by models, not measurements: what undoing the choice alone is "
    "predicted to change."
)


@dataclass(frozen=True)
class Attribution:
    """One choice of a trial.

    Attributes:
        parameter, value: what was chosen.
        undone: the value of the base.
        loss: predicted AP points that it costs.
        saved_ms: predicted milliseconds that it saves; negative where it makes the model slower.
    """

    parameter: str
    value: Value
    undone: Value
    loss: float
    saved_ms: float


@dataclass(frozen=True)
class Explanation:
    """A trial taken apart.

    Attributes:
        number: of the trial.
        choices: the most expensive first, then those that save the most.
        predicted_loss, predicted_saved_ms: of the whole recipe, by the same models. Losses add up to it,
            less what training gains the base where losses count from the base as it came; savings need not,
            because two choices on one layer share what they save.
        measured_loss, measured_saved_ms: of the trial; None where it was not measured to the end.
        counted: a sentence that says from which base losses count.
    """

    number: int
    choices: Sequence[Attribution]
    predicted_loss: float
    predicted_saved_ms: float
    measured_loss: float | None
    measured_saved_ms: float | None
    counted: str = ""

    @property
    def summed_loss(self) -> float:
        """AP points that the choices cost together, one by one."""
        return sum(choice.loss for choice in self.choices)

    @property
    def summed_saved_ms(self) -> float:
        """Milliseconds that the choices save, each undone alone."""
        return sum(choice.saved_ms for choice in self.choices)

    def to_json(self) -> dict[str, Any]:
        """Plain data, sums and the remark included."""
        return {
            **asdict(self),
            "summed_loss": self.summed_loss,
            "summed_saved_ms": self.summed_saved_ms,
            "remark": REMARK,
        }


def explain(study: SearchStudy, table: SpaceTable, number: int) -> Explanation:
    """Take trial `number` apart.

    Raises:
        InputError: no such trial, one without parameters of this space, or a study without base or
            sensitivities.
    """
    trials = study.optuna.get_trials(deepcopy=False)
    if not 0 <= number < len(trials):
        raise InputError("trial", number, f"study {study.name} has trials 0 to {len(trials) - 1}")
    if trials[number].state == TrialState.WAITING or set(trials[number].params) != set(table.names):
        state = trials[number].state.name.lower()
        raise InputError("trial", number, f"is {state} and has no recipe of this space to explain")
    base, damage = base_evaluation(study), measured_damage(table, study)
    if base is None or damage is None:
        raise InputError(
            "study",
            study.name,
            "has no base or no sensitivities yet; search with the sampler front or --seeds",
        )
    experience = ExperienceReader(table).read(trials)
    loss, _ = believed_loss(table, damage, experience)
    model = latency_learner(table, study)(experience.finished)
    reference_ms = base.metrics["latency_ms"].value / base.metrics["latency_ratio"].value
    reference_ms *= latency_scale(study)
    figures = figures_of(trials[number]) if trials[number].state == TrialState.COMPLETE else None
    problem = problem_of(study) or Problem()
    against = reference_of(base, problem.losses_from).metrics["map"].value
    found = attributed(
        table,
        trials[number],
        loss,
        model,
        reference_ms,
        measured=None if figures is None else (against - figures[0], (1 - figures[1]) * reference_ms),
    )
    uncounted = reference_of(base).metrics["map"].value - against
    return replace(
        found, predicted_loss=found.predicted_loss - uncounted, counted=_counted(base, against, uncounted)
    )


def _counted(base: Evaluation, against: float, uncounted: float) -> str:
    """From which base losses count: which has `against` AP, `uncounted` below what choices count from."""
    if uncounted:
        return (
            f"Losses of the whole count from the base as it came, {against:.2f} AP, those of single choices "
            f"from the base trained further, {against + uncounted:.2f} AP."
        )
    which = "the base trained further" if gain_of_training_further(base) else "the base"
    return f"Losses count from {which}, {against:.2f} AP."


def attributed(
    table: SpaceTable,
    trial: FrozenTrial,
    loss: LossModel,
    model: LatencyModel,
    reference_ms: float,
    measured: tuple[float, float] | None,
) -> Explanation:
    """The explanation of a trial by given models; its losses count from the base that those of `loss` do.

    Args:
        reference_ms: latency of the base.
        measured: the trial's loss of AP and the milliseconds that it saves.
    """
    options = table.options([trial.params])[0]
    chosen = np.nonzero(options)[0]
    undone = np.repeat(options[None], len(chosen) + 1, axis=0)
    undone[np.arange(len(chosen)), chosen] = 0
    latencies = model.predict(undone) * reference_ms
    parameters = list(table.space.parameters.values())
    single = loss.each(options[None])[0]
    choices = [
        Attribution(
            parameter=table.names[p],
            value=parameters[p].values[options[p]],
            undone=parameters[p].values[0],
            loss=float(single[p]),
            saved_ms=float(latencies[k] - latencies[-1]),
        )
        for k, p in enumerate(chosen)
    ]
    base = float(model.predict(np.zeros_like(options)[None])[0]) * reference_ms
    return Explanation(
        number=trial.number,
        choices=sorted(choices, key=lambda c: (-c.loss, -c.saved_ms)),
        predicted_loss=float(single.sum()),
        predicted_saved_ms=base - float(latencies[-1]),
        measured_loss=None if measured is None else measured[0],
        measured_saved_ms=None if measured is None else measured[1],
    )
