"""Losses of single choices, fitted to trials of made-up detectors."""

from __future__ import annotations

import numpy as np
import pytest

from search.knowledge import Finished
from search.loss_model import LossModel, fit_loss
from tests.search.test_solver import random_damage
from tests.search.toy_space import toy_table


def test_loss_weights_are_recovered() -> None:
    """Pruning that costs 3 AP a unit and bits that cost 0.5 are told apart."""
    table = toy_table()
    damage = random_damage(table, 1)
    bits = np.array([name.startswith("bits ") for name in table.names])
    random = np.random.default_rng(0)
    options = random.integers(0, table.sizes, size=(40, len(table.sizes)))
    options[0] = 0
    single = damage[np.arange(len(bits)), options]
    quality = 60 - 3.0 * single[:, ~bits].sum(1) - 0.5 * single[:, bits].sum(1)
    model = fit_loss(table, damage, Finished(options, quality, np.ones(40)), 60.0)
    predicted = model.loss[np.arange(len(bits)), options].sum(1)
    assert np.median(model.weights[~bits]) == pytest.approx(3.0, rel=0.2)
    assert np.median(model.weights[bits]) < 1.5
    assert np.corrcoef(predicted, 60 - quality)[0, 1] > 0.99


def test_a_parameter_that_training_does_not_repair_is_found_out() -> None:
    """All pruning costs 1 AP a unit, but one parameter's costs 5: its weight must stand out."""
    table = toy_table()
    damage = random_damage(table, 2)
    random = np.random.default_rng(0)
    options = random.integers(0, table.sizes, size=(60, len(table.sizes)))
    single = damage[np.arange(len(table.sizes)), options]
    quality = 60 - single.sum(1) - 4.0 * single[:, 1]
    weights = fit_loss(table, damage, Finished(options, quality, np.ones(60)), 60.0).weights
    pruning = [k for k, name in enumerate(table.names) if name.startswith("sparsity")]
    assert weights[1] > 2 * max(weights[k] for k in pruning if k != 1)


def test_a_small_damage_may_be_repaired_and_a_large_one_of_the_same_choice_not() -> None:
    """A weight for the parameter alone would split the difference; an option has a loss of its own."""
    table = toy_table()
    damage = random_damage(table, 3)
    damage[1, 1:] = np.where(np.isfinite(damage[1, 1:]), np.linspace(1.0, 3.0, damage.shape[1] - 1), np.inf)
    random = np.random.default_rng(0)
    options = random.integers(0, table.sizes, size=(60, len(table.sizes)))
    last = int(table.sizes[1]) - 1
    single = damage[np.arange(len(table.sizes)), options]
    single[:, 1] = np.where(options[:, 1] == last, 9.0, 0.0)
    model = fit_loss(table, damage, Finished(options, 60 - single.sum(1), np.ones(60)), 60.0)
    assert model.loss[1, last] == pytest.approx(9.0, abs=1.5)
    assert (model.loss[1, 1:last] < 1.0).all()


def test_gains_with_little_pruning_do_not_make_much_pruning_free() -> None:
    """Rounding costs what its damage says; trials with a little pruning, which was repaired, gained mAP."""
    table = toy_table()
    damage = random_damage(table, 4)
    pruning = np.array([name.startswith("sparsity") for name in table.names])
    rows = np.arange(len(pruning))
    random = np.random.default_rng(0)
    options = np.where(pruning, 1, 0) * random.integers(0, 2, size=(20, len(pruning)))
    options[10:] = np.where(pruning, 0, random.integers(0, table.sizes, size=(10, len(pruning))))
    lost = np.where(np.arange(20) < 10, -1.0, damage[rows, options].sum(axis=1))
    model = fit_loss(table, damage, Finished(options, 60 - lost, np.ones(20)), 60.0)
    most = np.where(pruning, table.sizes - 1, 0)
    assert model.of(options[:10]).max() < 0.5
    assert model.of(most[None])[0] > 0.15 * damage[rows, most].sum()


def test_what_is_not_there_stays_infinite_and_counts_nothing() -> None:
    damage = np.array([[0.0, 1.0, np.inf], [0.0, 2.0, 4.0]])
    model = LossModel(damage, 3.0 * damage)
    assert model.weights == pytest.approx([3.0, 3.0])
    assert model.of(np.array([[1, 2], [2, 1], [0, 0]])) == pytest.approx([15.0, 6.0, 0.0])
    table = toy_table()
    damage = random_damage(table, 5)
    damage[0, 1] = np.inf
    options = np.minimum(np.ones((4, len(table.sizes)), np.int64), table.sizes - 1)
    fitted = fit_loss(table, damage, Finished(options, np.full(4, 55.0), np.ones(4)), 60.0)
    assert (np.isinf(fitted.loss) == np.isinf(damage)).all()
    assert (fitted.loss[:, 0] == 0).all()


def test_trials_whose_choices_do_no_damage_leave_the_scale_alone() -> None:
    """Most trials chose what does none; the last one lost 0.5 AP by options of damage 0.05."""
    table = toy_table()
    damage = np.full((len(table.names), int(max(table.sizes))), 0.05)
    damage[:, 0] = damage[0] = 0.0
    options = np.zeros((7, len(table.names)), np.int64)
    options[1:6, 0] = 1
    options[6, 1] = 1
    quality = np.array([60.0, 60.1, 59.9, 60.0, 59.9, 59.8, 59.5])
    model = fit_loss(table, damage, Finished(options, quality, np.ones(7)), 60.0)
    assert model.loss[1, 1] == pytest.approx(0.5, abs=0.3)
    untold = fit_loss(table, damage, Finished(options[:6], quality[:6], np.ones(6)), 60.0)
    assert np.isfinite(untold.loss).all()
    assert untold.loss.max() < 1.0
