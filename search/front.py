"""The front of a study: its rows from what the study stores, and where they are written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from optuna.trial import FrozenTrial

from evaluators.evaluation import Evaluation
from evaluators.ranking import LossesFrom, Problem, front
from search.chosen import evaluations_of, front_within
from search.expected_loss import expected_differences
from search.heat_map import HeatMap
from search.judge import (
    base_number,
    gain_of_training_further,
    latency_scale,
    problem_of,
    reference_of,
)
from search.report import FrontRow, TrialPoint, rows_to_json
from search.study import SearchStudy
from search.trials import counts, is_stopped, recipe_of
from spaces.errors import InputError

FINAL = "front measured again"
"""Study attribute: the models of the front in one batch and on report; see `search.final`."""

Role = Literal["select", "report"]


@dataclass(frozen=True)
class Front:
    """A front ready to be shown.

    Attributes:
        base: the unchanged model.
        rows: the models of the front, the most accurate first; the base may be among them.
        trials: all finished candidates.
        losses_against: mAP that losses count against: above the base's where it had not converged, unless
            the problem says `losses_from: given`.
        remarks: lines that a reader of the figures must know.
    """

    base: FrontRow
    rows: list[FrontRow]
    trials: list[TrialPoint]
    losses_against: float
    remarks: list[str] = field(default_factory=list)

    def to_json(self) -> list[dict[str, Any]]:
        """The rows as JSON objects, with the interval's ends and the loss of mAP beside the rest."""
        listed = rows_to_json(self.rows)
        for item, row in zip(listed, self.rows, strict=True):
            item["ratio_low"], item["ratio_high"] = row.interval or (None, None)
            item["map_drop"] = self.losses_against - row.map
        return listed


def front_of(study: SearchStudy, problem: Problem | None = None, role: Role = "select") -> Front:
    """The front of what the study has.

    Args:
        study: with a complete base.
        problem: whose limits count; None takes that of the study, as it was last opened.
        role: whose mAP the rows show. On `report` only what was measured there has one, and the rows are
            still those that were chosen on select.

    Raises:
        InputError: the base is not complete yet, or nothing was measured on report.
    """
    trials = study.optuna.get_trials(deepcopy=False)
    number = base_number(study)
    if number is None:
        raise InputError("study", study.name, "has no base yet; let the search run until its first trial")
    evaluations = evaluations_of(trials)
    final: dict[str, Any] = study.optuna.user_attrs.get(FINAL, {})
    if role == "report" and not final:
        raise InputError("report", None, "nothing was measured on it yet; use paredown front --remeasure")
    measured = evaluations[number]
    scale = latency_scale(study)
    problem = problem_of(study) if problem is None else problem
    counted_from = "trained" if problem is None else problem.losses_from
    reference = reference_of(measured, counted_from)
    chosen = front_within(study, problem, evaluations, measured)
    rows = {
        n: _row(study, trials[n], evaluations[n], final, role, n == number, scale) for n in {*chosen, number}
    }
    remarks = _remarks(measured, counted_from, role, chosen, final)
    if not chosen:
        remarks.append("no trial keeps the limits; the base is shown")
    if role == "select":
        likely = expected_differences(study, trials, chosen)
        rows = {n: replace(row, likely=None if row.is_base else likely.get(n)) for n, row in rows.items()}
    stopped, counted = sum(map(is_stopped, filter(counts, trials))), sum(map(counts, trials))
    if stopped:
        remarks.append(
            f"{stopped} of {counted} trials were stopped early at a rung and are not compared here"
        )
    remarks += _how_it_runs({n: evaluations[n] for n in sorted({*chosen, number})})
    listed = sorted((rows[n] for n in chosen if role == "select" or _on_report(n, final)), key=_best_first)
    if role == "select":
        beaten = _beaten(study, listed, final)
        listed = [row for row in listed if row.number not in beaten]
        if beaten:
            remarks.append(
                "left out, because another one proved at least as fast and as accurate when they were "
                f"measured again: trial {', '.join(map(str, sorted(beaten)))}"
            )
    gain = reference.metrics["map"].value - measured.metrics["map"].value if role == "select" else 0.0
    if gain:  # the table's own differences are to the base as it is
        goal = rows[number].map + gain
        listed = [replace(r, note=f"{r.map - goal:+.1f} to trained base") for r in listed]
    points = [
        TrialPoint(n, e.metrics["map"].value, e.metrics["latency_ms"].value * scale)
        for n, e in evaluations.items()
    ]
    return Front(rows[number], listed, points, rows[number].map + gain, remarks)


def write_pictures(
    front_: Front, folder: Path, title: str, subtitle: str, heat: HeatMap | None = None
) -> list[Path]:
    """Write `front.png`, `front.html` and, of a sensitivity, `sensitivity.png` into a folder, which is made.

    Returns:
        Their paths.
    """
    from search.figure_page import front_html
    from search.figures import front_png
    from search.heat_picture import heat_png

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("output", str(folder), f"cannot be made: {error.strerror}") from None
    png, page = folder / "front.png", folder / "front.html"
    # Trials are measured on select; beside figures of report they would compare apples with pears.
    trials = front_.trials if all(row.split == front_.base.split for row in front_.rows) else []
    front_png(png, front_.rows, front_.base, trials=trials, title=title, subtitle=subtitle)
    front_html(page, front_.rows, front_.base, trials=trials, title=title, subtitle=subtitle, heat=heat)
    if heat is None:
        return [png, page]
    sensitivity = folder / "sensitivity.png"
    heat_png(sensitivity, heat, subtitle=f"{title}: {subtitle}")
    return [png, page, sensitivity]


def subtitle_of(study: SearchStudy) -> str:
    """What the figures of a study were measured with, in one line."""
    said = study.fingerprint
    parts = [
        f"{said.get('detector')} at {said.get('input size')}",
        str(said.get("target engine")).split("-")[0],
        f"{said.get('target threads')} thread{'s' * (str(said.get('target threads')) != '1')}",
        str(said.get("target cpu")),
        time.strftime("%Y-%m-%d"),
    ]
    return ", ".join(part for part in parts if "None" not in part)


def best_within(front_: Front, max_map_drop: float | None) -> FrontRow:
    """The fastest row of a front that loses at most so much mAP; without a bound the default of 1.0.

    It must be likely to lose no more on other images either, where that is known: the fastest that just kept
    the bound owes more to luck than the others.

    Raises:
        InputError: no row keeps the bound.
    """
    bound = 1.0 if max_map_drop is None else max_map_drop
    kept = [row for row in front_.rows if _loss(front_, row) <= bound + 1e-9]
    if not kept:
        raise InputError(
            "--max-map-drop", bound, "no model of the front loses so little; name one by --trial"
        )
    return min(kept, key=lambda row: row.latency_ratio)


def _loss(front_: Front, row: FrontRow) -> float:
    """AP points that a row lost, or is likely to lose, whichever is more."""
    likely = row.map if row.likely is None else front_.base.map + row.likely
    return front_.losses_against - min(row.map, likely)


def _best_first(row: FrontRow) -> tuple[float, float]:
    return -row.map, row.latency_ratio


def _on_report(number: int, final: dict[str, Any]) -> bool:
    return str(number) in final.get("models", {})


def _row(
    study: SearchStudy,
    trial: FrozenTrial,
    evaluation: Evaluation,
    final: dict[str, Any],
    role: Role,
    is_base: bool,
    scale: float,
) -> FrontRow:
    metrics, recipe = evaluation.metrics, recipe_of(trial)
    assert recipe is not None
    artifact = study.trial_folder(trial.number) / Path(evaluation.artifact or "model.onnx").name
    ratio, tensor = metrics["latency_ratio"], metrics.get("tensor_ms")
    row = FrontRow(
        number=trial.number,
        map=metrics["map"].value,
        split=evaluation.split,
        latency_ms=metrics["latency_ms"].value * scale,
        latency_ratio=ratio.value,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        size_mb=metrics["size_mb"].value,
        params=round(metrics["params"].value),
        artifact=str(artifact) if artifact.is_file() else None,
        recipe=recipe.model_dump(mode="json"),
        is_base=is_base,
        tensor_ms=None if tensor is None else tensor.value * scale,
        role=role,
    )
    again = final.get("models", {}).get(str(trial.number))
    if again is None:
        return row
    reference_ms = row.latency_ms / row.latency_ratio
    row = replace(
        row,
        latency_ms=again["ratio"] * reference_ms,
        latency_ratio=again["ratio"],
        ratio_low=again["low"],
        ratio_high=again["high"],
        tensor_ms=row.tensor_ms and row.tensor_ms * again["ratio"] / row.latency_ratio,
    )
    if role == "select":
        return row
    _, low, high = again["map_difference"]
    note = "" if is_base else f"mAP to base {low:+.1f} to {high:+.1f} (95 %)"
    return replace(row, map=again["map"], split=final["split"], note=note)


def _beaten(study: SearchStudy, rows: Sequence[FrontRow], final: dict[str, Any]) -> set[int]:
    """Numbers of the rows that another one dominates by the ratios that were measured together."""
    if not set(study.objectives) <= {"map", "latency_ms", "latency_ratio"}:
        return set()  # another objective may be what they are on the front for
    again = [row for row in rows if _on_report(row.number, final)]
    kept = set(front([(row.latency_ratio, -row.map) for row in again]))
    return {row.number for i, row in enumerate(again) if i not in kept}


def _how_it_runs(evaluations: dict[int, Evaluation]) -> list[str]:
    """What the engine's profiles say: layers that fell back, and rooflines in place of measurements."""
    fallen = [
        f"{len(found)} of trial {n}" for n, e in evaluations.items() if (found := e.details.get("fell_back"))
    ]
    shares = [
        f"trial {n} {found['share']:.0%}"
        for n, e in evaluations.items()
        if (found := e.details.get("roofline"))
    ]
    remarks = []
    if fallen:
        remarks.append(f"layers that do not run at the bit-width chosen for them: {', '.join(fallen)}")
    if shares:
        remarks.append(
            "latencies are predicted from a description of the hardware, nothing was timed; share of the "
            f"roofline: {', '.join(shares)}"
        )
    return remarks


def _remarks(
    base: Evaluation, counted_from: LossesFrom, role: Role, chosen: set[int], final: dict[str, Any]
) -> list[str]:
    remarks = []
    gain = gain_of_training_further(base)
    if gain:
        # what training it further gains was measured on select alone
        counted = "that" if counted_from == "trained" and role == "select" else "the base as it came"
        gains = f"the base was not converged: +{gain:.1f} AP with a candidate's budget"
        remarks.append(f"{gains}; losses are against {counted}")
    missing = sorted(n for n in chosen if not _on_report(n, final))
    if final and missing:
        what = "are not shown" if role == "report" else "show their own measurement"
        remarks.append(
            f"not measured again together with the rest: trial {', '.join(map(str, missing))}; these {what}"
        )
    return remarks
