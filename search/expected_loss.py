"""What the models of a study are likely to lose on images that nobody has chosen by.

The best of many trials on few images owes part of its AP to luck. How much is told by the intervals of the
AP and by what the other trials say of the same choices: the measured difference is drawn towards the one that
the study's model predicts without that trial, each by what is known of its error (empirical Bayes; Efron and
Morris 1975, "Data analysis using Stein's estimator and its generalizations", JASA 70).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial

from search.experience import Experience, ExperienceReader, believed_loss
from search.knowledge import Finished, Positions
from search.linear_algebra import on_one_thread
from search.sensitivity import stored_sensitivity
from search.study import SearchStudy
from search.trials import evaluation_of, is_candidate
from spaces.table import Options

DIFFERENCE = "map_difference"
"""Metric of a trial: its mAP minus the base's on select, with an interval over images."""
NEAR = 6.0
"""The error of predictions is taken from trials that lose at most so many AP points, as fronts do."""
MILD = 2.5
"""Trials that lose at most so many AP points say whether the model is too strict with all of them."""
FEW = 8
"""With fewer such trials nothing is drawn anywhere."""
OTHERS = 60
"""Trials beside those asked for, at most: each takes a fit of the model without it."""
SCALE, LEAST_ERROR = 0.5, 0.1
"""The error of a prediction grows with what is predicted from this many AP points on, as the fit of the model
takes it; and what it is at least, relative to that."""
WIDTH = 2 * 1.96
"""Standard errors that a 95 % interval spans."""


def expected_differences(
    study: SearchStudy, trials: Sequence[FrozenTrial], wanted: Collection[int]
) -> dict[int, float]:
    """mAP to the base, AP points, that some trials are likely to have on other images, by their numbers.

    Nothing is said of trials without an interval, nor where a study has no sensitivities or too few trials.

    Args:
        study: of the trials.
        trials: all of it.
        wanted: numbers of those that are asked for.
    """
    known = stored_sensitivity(study)
    if known is None:
        return {}
    names, rows, measured, errors = set(known.names), [], [], []
    numbers = []
    for trial in _some(trials, wanted):
        evaluation = evaluation_of(trial) if is_candidate(trial) else None
        found = None if evaluation is None else evaluation.metrics.get(DIFFERENCE)
        if found is None or found.low is None or found.high is None or set(trial.params) != names:
            continue
        numbers.append(trial.number)
        rows.append(known.options([trial.params])[0])
        measured.append(found.value)
        errors.append((found.high - found.low) / WIDTH)
    if len(numbers) < FEW:
        return {}
    experience = ExperienceReader(known).read(trials)
    with on_one_thread():
        predicted = -predicted_losses(known, known.damage, experience, np.array(rows))
    likely = drawn_together(np.array(measured), np.array(errors), predicted)
    return {
        number: float(value)
        for number, value in zip(numbers, likely, strict=True)
        if number in wanted and np.isfinite(value)
    }


def _some(trials: Sequence[FrozenTrial], wanted: Collection[int]) -> list[FrozenTrial]:
    """Those that are wanted and others, evenly spread, that the error of predictions is taken from."""
    others = [trial for trial in trials if trial.number not in wanted]
    picked = sorted({round(k) for k in np.linspace(0, len(others) - 1, min(len(others), OTHERS))})
    return [*(trial for trial in trials if trial.number in wanted), *(others[k] for k in picked)]


def predicted_losses(
    table: Positions, damage: NDArray[np.float64], experience: Experience, options: Options
) -> NDArray[np.float64]:
    """Loss of mAP `(N,)` that the study predicts for each recipe `(N, P)` from the other trials alone."""
    predicted = np.empty(len(options))
    for k, row in enumerate(options):
        others = (experience.finished.options != row).any(axis=1)
        model, _ = believed_loss(table, damage, without(experience, others))
        predicted[k] = model.of(row[None])[0]
    return predicted


def without(experience: Experience, kept: NDArray[np.bool_]) -> Experience:
    """The experience with these of its finished trials alone."""
    finished, passed = experience.finished, experience.passed
    return replace(
        experience,
        finished=Finished(finished.options[kept], finished.map[kept], finished.ratio[kept]),
        passed=[one for one, stays in zip(passed, kept, strict=True) if stays],
    )


def drawn_together(
    measured: NDArray[np.float64], errors: NDArray[np.float64], predicted: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Means of measured and predicted differences `(N,)`, weighted by the inverse squares of their errors.

    Predictions are shifted first so that half of the mild trials measured more: a model that is too strict
    with all of them says nothing of any one. The error of predictions is what remains of the distances when
    the measurements' own are taken off.

    Args:
        measured: differences to the base, AP points.
        errors: their standard errors.
        predicted: of the same.

    Returns:
        NaN where either, shifted, is further than `NEAR` below the base, and everywhere with fewer than `FEW`
        others.
    """
    mild = measured >= -MILD
    if mild.any():
        predicted = predicted + np.median((measured - predicted)[mild])
    near = np.minimum(measured, predicted) >= -NEAR
    likely = np.full(len(measured), np.nan)
    if near.sum() < FEW:
        return likely
    scale = SCALE + np.abs(predicted)
    # The median of squares is .455 times their mean for normal errors, and deaf to the few that are far off.
    spread = float(np.median(((measured - predicted) / scale)[near] ** 2)) / 0.455
    relative = max(spread - float(np.mean((errors / scale)[near] ** 2)), LEAST_ERROR**2)
    share = relative * scale**2 / (relative * scale**2 + errors**2)
    likely[near] = (share * measured + (1 - share) * predicted)[near]
    return likely
