"""Measured differences drawn towards predicted ones: by hand, on a made-up detector, and from a study."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from optuna.trial import create_trial

from evaluators.evaluation import Evaluation, Measurement
from search.expected_loss import (
    DIFFERENCE,
    FEW,
    NEAR,
    drawn_together,
    expected_differences,
    predicted_losses,
    without,
)
from search.experience import Experience
from search.knowledge import Finished
from search.sensitivity import sensitivity_of, store_sensitivity
from search.study import SearchStudy
from search.trials import EVALUATION, RECIPE
from tests.search.test_sampler import MadeUp
from tests.search.toy_problem import toy_study

LUCK = 0.8
"""Standard error of a measured AP."""


def test_drawn_together_by_hand() -> None:
    predicted = np.full(10, -0.5)  # a scale of .5 + .5
    apart = np.array([2.0, -2.0] * 5)
    measured, errors = predicted + apart, np.ones(10)
    # Squared distances of 4 are a spread of 4 / .455 = 8.791; less 1 for the measurements' own.
    share = 7.791 / 8.791
    np.testing.assert_allclose(drawn_together(measured, errors, predicted), -0.5 + share * apart, rtol=1e-3)
    sure = drawn_together(measured, np.full(10, 1e-6), predicted)
    np.testing.assert_allclose(sure, measured)
    gentler = drawn_together(measured + 0.25, errors, predicted)
    np.testing.assert_allclose(gentler, -0.25 + share * apart, rtol=1e-3)  # all predictions were too strict


def test_far_ones_and_few_ones_are_left_alone() -> None:
    predicted, errors = np.full(FEW + 1, -0.5), np.ones(FEW + 1)
    measured = predicted.copy()
    measured[0] = -NEAR - 0.1
    likely = drawn_together(measured, errors, predicted)
    assert np.isnan(likely[0])
    assert np.isfinite(likely[1:]).all()
    assert np.isnan(drawn_together(measured[:-1], errors[:-1], predicted[:-1])).all()


@pytest.mark.parametrize("gain", [0.0, 3.0, 6.5, 20.0])
def test_what_the_base_gains_from_training_is_no_distance(gain: float) -> None:
    """Predictions count from the trained base; all of them are too low by what it gained."""
    random = np.random.default_rng(0)
    measured = random.uniform(-2.5, 0.5, 20)
    predicted = measured + random.normal(0.0, 0.3, 20)
    likely = drawn_together(measured, np.full(20, 0.7), predicted - gain)
    np.testing.assert_allclose(likely, drawn_together(measured, np.full(20, 0.7), predicted))
    assert np.isfinite(likely).all()


class Lucky:
    """Random recipes of the made-up detector, a quarter of its losses, whose measured mAP is off by luck."""

    def __init__(self, seed: int, count: int = 40) -> None:
        self.made_up, random = MadeUp(seed), np.random.default_rng(seed)
        table = self.made_up.table
        chosen = random.random((count, len(table.names))) < 0.4
        self.options = np.where(chosen, random.integers(0, table.sizes, size=chosen.shape), 0)
        self.options[0] = 0
        self.options = np.unique(self.options, axis=0)
        figures = [self.made_up.evaluate(row) for row in self.options]
        self.true = (np.array([quality for quality, _ in figures]) - 60.0) / 4
        luck = LUCK * random.standard_normal(len(self.true))
        self.measured = self.true + np.where(self.options.any(axis=1), luck, 0.0)
        self.ratio = np.array([ratio for _, ratio in figures])

    @property
    def experience(self) -> Experience:
        finished = Finished(self.options, 60.0 + self.measured, self.ratio)
        nothing = np.zeros((0, self.options.shape[1]), np.int64)
        passed: list[dict[int, float]] = [{} for _ in self.options]
        return Experience(finished, passed, nothing, [], nothing, frozenset())

    def likely(self) -> NDArray[np.float64]:
        table, damage = self.made_up.table, self.made_up.damage
        predicted = -predicted_losses(table, damage, self.experience, self.options)
        return drawn_together(self.measured, np.full(len(self.true), LUCK), predicted)


def test_what_is_likely_is_nearer_to_the_truth_and_luck_is_taken_off_the_luckiest() -> None:
    """The model's form is not the truth's here: losses are roots of sums of damages."""
    errors, flattery = [], []
    for seed in range(8):
        lucky = Lucky(seed)
        likely = lucky.likely()
        known = np.isfinite(likely)
        assert known.sum() > 15
        away = [np.sqrt(np.mean((v - lucky.true)[known] ** 2)) for v in (lucky.measured, likely)]
        errors.append(away[1] / away[0])
        luckiest = np.argsort(lucky.measured[known] - lucky.true[known])[-5:]
        flattery.append([(v - lucky.true)[known][luckiest].mean() for v in (lucky.measured, likely)])
    assert np.median(errors) < 0.9
    measured, expected = np.mean(flattery, axis=0)
    assert measured > 0.8
    assert expected < 0.75 * measured


def test_a_trial_is_predicted_without_itself() -> None:
    lucky = Lucky(1)
    table, damage = lucky.made_up.table, lucky.made_up.damage
    row = len(lucky.options) // 2
    before = predicted_losses(table, damage, lucky.experience, lucky.options[row : row + 1])
    lucky.measured[row] -= 5.0
    after = predicted_losses(table, damage, lucky.experience, lucky.options[row : row + 1])
    np.testing.assert_array_equal(before, after)
    others = predicted_losses(table, damage, lucky.experience, lucky.options[row + 1 : row + 2])
    lucky.measured[row] += 5.0
    assert others != predicted_losses(table, damage, lucky.experience, lucky.options[row + 1 : row + 2])


def test_an_experience_without_some_keeps_what_goes_together() -> None:
    lucky = Lucky(0)
    experience = lucky.experience
    kept = np.arange(len(lucky.options)) % 2 == 0
    half = without(experience, kept)
    assert len(half.passed) == len(half.finished.map) == kept.sum()
    np.testing.assert_array_equal(half.finished.options, lucky.options[kept])


def stored(folder: Path, lucky: Lucky, intervals: bool = True) -> SearchStudy:
    """A study that was told what the lucky ones measured."""
    study, space = toy_study(folder), lucky.made_up.table.space
    for options, difference, ratio in zip(lucky.options, lucky.measured, lucky.ratio, strict=True):
        params = lucky.made_up.table.params(options)
        metrics = {
            "map": Measurement(value=60.0 + difference, unit="AP"),
            "latency_ratio": Measurement(value=float(ratio), unit="x"),
            "latency_ms": Measurement(value=10 * float(ratio), unit="ms"),
        }
        if intervals and options.any():
            ends = difference - 1.96 * LUCK, difference + 1.96 * LUCK
            metrics[DIFFERENCE] = Measurement(value=difference, unit="AP", low=ends[0], high=ends[1])
        evaluation = Evaluation(recipe_key="k", status="ok", metrics=metrics)
        study.optuna.add_trial(
            create_trial(
                params=params,
                distributions=space.distributions(),
                values=[60.0 + difference, 10 * float(ratio)],
                user_attrs={
                    RECIPE: space.recipe(params).to_json(),
                    EVALUATION: evaluation.model_dump_json(),
                },
            )
        )
    return study


def test_a_study_tells_it_of_those_that_are_asked_for(tmp_path: Path) -> None:
    lucky = Lucky(2)
    study = stored(tmp_path, lucky)
    trials = study.optuna.get_trials(deepcopy=False)
    wanted = {0, 3, 5, 7}
    assert expected_differences(study, trials, wanted) == {}, "no sensitivities yet"
    store_sensitivity(study, sensitivity_of(lucky.made_up.table, lucky.made_up.damage))
    found = expected_differences(study, trials, wanted)
    likely = lucky.likely()
    assert set(found) == {n for n in wanted - {0} if np.isfinite(likely[n])}, "the base has no interval"
    assert found
    assert all(lucky.true[n] - 3 < value < lucky.measured[n] + 3 for n, value in found.items())


def test_older_studies_without_intervals_say_nothing(tmp_path: Path) -> None:
    lucky = Lucky(2)
    study = stored(tmp_path, lucky, intervals=False)
    store_sensitivity(study, sensitivity_of(lucky.made_up.table, lucky.made_up.damage))
    trials = study.optuna.get_trials(deepcopy=False)
    assert expected_differences(study, trials, {1, 2}) == {}
    assert pytest.approx(0.0) == lucky.measured[0]
