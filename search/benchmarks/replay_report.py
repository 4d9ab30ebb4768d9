"""What a replay of samplers showed, as Markdown and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from search.benchmarks.contenders import CONTENDERS
from search.benchmarks.curves import Curve, draw_curves
from search.benchmarks.recorded import Recorded
from search.benchmarks.replay import CORNER_LOSS, Outcome, with_interval
from search.benchmarks.reports import table, write
from search.benchmarks.surrogate import NEAR, Surrogate

OURS = "front"
CHECKPOINTS = (25, 50, 100, 200, 300)


def write_comparison(
    file: Path,
    recorded: Recorded,
    surrogate: Surrogate,
    outcomes: Mapping[str, Outcome],
    facts: Mapping[str, Any],
) -> None:
    """Write the report as Markdown, the hypervolumes of every seed as JSON and a picture beside it."""
    longest = max(outcome.volumes.shape[1] for outcome in outcomes.values())
    points = [t for t in CHECKPOINTS if t < longest] + [longest]
    lines = [
        f"Hypervolume against (base AP - {CORNER_LOSS:g}, base latency), 1 = no loss in no time. Medians "
        "over the seeds with 95 % bootstrap intervals. Space, sensitivities and probes are those of the "
        f"recorded studies; {len(recorded.recipes)} really evaluated recipes teach the surrogate.",
        "",
        *table(
            ["sampler", "runs", *(f"{t} trials" for t in points)],
            [
                [name, len(outcome.volumes), *(_cell(outcome.at(t)) for t in points)]
                for name, outcome in outcomes.items()
            ],
        ),
        "",
        *_verdicts(outcomes, longest),
        "",
        "## The surrogate",
        "",
        *table(
            [
                "predicts",
                "model",
                "rank correlation, unseen",
                "median error",
                f"the same at losses <= {NEAR:g} AP",
            ],
            [
                [
                    name,
                    kind,
                    f"{check.rank:.3f}",
                    f"{check.error:.3f}",
                    f"{check.near_rank:.3f}, {check.near_error:.3f}",
                ]
                for name, checks in surrogate.checks.items()
                for kind, check in checks.items()
            ],
        ),
    ]
    sources = {s: recorded.source.count(s) for s in dict.fromkeys(recorded.source)}
    lines += ["", "Recipes by the study that proposed them: "]
    lines[-1] += ", ".join(f"{name} {count}" for name, count in sources.items()) + "."
    lines += ["", "## Conditions"]
    volumes = {name: outcome.volumes.round(5).tolist() for name, outcome in outcomes.items()}
    conditions = {**facts, **recorded.conditions}
    write(file, "Samplers on recorded recipes", lines, {"volumes": volumes}, conditions, indent=None)
    draw_curves(
        file.with_suffix(".png"),
        _curves(outcomes),
        "Hypervolume of the front by trials",
        f"{recorded.detector} on {recorded.conditions.get('target', 'its target')}; surrogate of "
        f"{len(recorded.recipes)} evaluated recipes; medians with 95 % intervals",
        "trials",
    )


def _curves(outcomes: Mapping[str, Outcome]) -> list[Curve]:
    """One for each sampler; those that are the same in every run are one, under both names."""
    names: dict[bytes, list[str]] = {}
    for name, outcome in outcomes.items():
        names.setdefault(outcome.volumes.tobytes(), []).append(name)
    return [_curve(" = ".join(same), outcomes[same[0]]) for same in names.values()]


def _curve(name: str, outcome: Outcome) -> Curve:
    trials = np.arange(1, outcome.volumes.shape[1] + 1)
    middle, low, high = np.transpose([with_interval(column) for column in outcome.volumes.T])
    return Curve(name, trials, middle, low, high, ours=name == OURS)


def _verdicts(outcomes: Mapping[str, Outcome], longest: int) -> list[str]:
    """Ours against the best cold and the best seeded plain sampler."""
    ours = outcomes.get(OURS)
    if ours is None:
        return []
    lines = []
    plain = {name: o for name, o in outcomes.items() if not name.startswith(OURS)}
    cold = {name: o for name, o in plain.items() if not CONTENDERS[name].seeds}
    if cold:
        best, trials, final = _best(cold, longest)
        needed = ours.trials_to(final)
        lines.append(
            f"- The best cold sampler, {best}, ends at {final:.4f} after {trials} trials; ours is there "
            f"after {needed:g} (median), {needed / trials:.2f} of its trials."
        )
    seeded = {name: o for name, o in plain.items() if CONTENDERS[name].seeds}
    at = min(100, longest)
    if seeded:
        best, trials, _ = _best(seeded, at)
        theirs = seeded[best].volumes[:, trials - 1]
        gains = ours.volumes[: len(theirs), at - 1] / theirs - 1
        value, low, high = with_interval(100 * gains)
        of = "" if trials == at else f" after its {trials}"
        lines.append(
            f"- At {at} trials ours is {value:+.2f} % [{low:+.2f}, {high:+.2f}] above the best seeded plain "
            f"sampler, {best}{of} (paired by seed)."
        )
    return lines


def _best(outcomes: Mapping[str, Outcome], trials: int) -> tuple[str, int, float]:
    """The sampler of the largest median after so many trials, or after all it was given, which, and that."""
    ends = {name: min(trials, o.volumes.shape[1]) for name, o in outcomes.items()}
    medians = {name: float(np.median(o.volumes[:, ends[name] - 1])) for name, o in outcomes.items()}
    best = max(medians, key=lambda name: medians[name])
    return best, ends[best], medians[best]


def _cell(figures: tuple[float, float, float] | None) -> str:
    return "" if figures is None else f"{figures[0]:.4f} [{figures[1]:.4f}, {figures[2]:.4f}]"
