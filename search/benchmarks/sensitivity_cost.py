"""What sensitivities cost beside the trials of the same study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from search.benchmarks.reports import table, write
from search.judge import base_number
from search.sensitivity import JOB
from search.study import SearchStudy
from search.trials import DUPLICATE_OF, counts
from spaces.errors import InputError

TRIALS = 100
BAR = 0.1
"""Share of a study's worker time that sensitivities may take."""


@dataclass(frozen=True)
class Cost:
    """Worker seconds of a study.

    Attributes:
        study: its name.
        options: whose damage was measured.
        sensitivity: of the jobs that measured it, all together.
        trials: that were evaluated, stopped or failed; the base and recipes met before are left out.
        per_trial: in the mean, with what it waited and was suspended.
        machine: processor and threads of a worker.
    """

    study: str
    options: int
    sensitivity: float
    trials: int
    per_trial: float
    machine: str

    @property
    def share(self) -> float:
        """Of the worker time of sensitivities and `TRIALS` trials, 0..1."""
        return self.sensitivity / (self.sensitivity + TRIALS * self.per_trial)


def cost_of(study: SearchStudy) -> Cost:
    """What a study has spent. Raises InputError where it has no sensitivities, or no trials yet."""
    name = study.optuna.study_name
    jobs = [result for job, result in study.job_results().items() if job.startswith(JOB)]
    if not jobs:
        raise InputError(
            "study", name, "measured no sensitivities; name one with a front sampler or with seeds"
        )
    base = base_number(study)
    seconds = [
        (trial.datetime_complete - trial.datetime_start).total_seconds()
        for trial in study.optuna.get_trials(deepcopy=False)
        if counts(trial)
        and trial.number != base
        and DUPLICATE_OF not in trial.user_attrs
        and trial.datetime_start is not None
        and trial.datetime_complete is not None
    ]
    if not seconds:
        raise InputError("study", name, "has no finished trials beside the base yet; let the search run")
    options = {key for result in jobs for key in result["damage"]}
    whole = sum(float(result["seconds"]) for result in jobs)
    made_for = study.fingerprint
    machine = f"{made_for.get('target cpu', '?')}, threads: {made_for.get('target threads', '?')}"
    return Cost(name, len(options), whole, len(seconds), sum(seconds) / len(seconds), machine)


def write_costs(file: Path, costs: Sequence[Cost], facts: Mapping[str, Any]) -> None:
    """Write the report."""
    head = [
        "study",
        "options measured",
        "sensitivities, s",
        "trials",
        "s a trial",
        f"share of {TRIALS} trials",
    ]
    rows = [
        [c.study, c.options, f"{c.sensitivity:.0f}", c.trials, f"{c.per_trial:.1f}", f"{c.share:.1%}"]
        for c in costs
    ]
    kept = sum(cost.share <= BAR for cost in costs)
    lines = [
        "Worker seconds of real studies, trials stopped at rungs included. The damage of every option of "
        f"every site is measured once; the bar is {BAR:.0%} of a study of {TRIALS} trials, kept by {kept} of "
        f"{len(costs)} studies.",
        "",
        *table(head, rows),
    ]
    facts = {"studies ran on": "; ".join(sorted({cost.machine for cost in costs})), **facts}
    content = {"studies": [asdict(cost) | {"share": cost.share} for cost in costs]}
    write(file, "What sensitivities cost", lines, content, facts)
