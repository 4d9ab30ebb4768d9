"""Ranges of activations: by hand, and against a plain search over integers."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from evaluators.calibration import CLIPS, QuantizationPlan, Range, best_range, calibrate, within_usual


def test_values_on_the_grid_keep_their_range() -> None:
    assert best_range(np.arange(256, dtype=np.float32)) == Range(0.0, 255.0)
    assert best_range(np.arange(-100, 156, dtype=np.float32)) == Range(-100.0, 155.0)


def test_0_lies_in_every_range() -> None:
    assert best_range(np.array([3.0, 5.0], np.float32)).low == 0.0
    assert best_range(np.array([-3.0, -5.0], np.float32)).high == 0.0
    zeros = best_range(np.zeros(5, np.float32))
    assert zeros.low == 0.0 < zeros.high


def integer_error(values: NDArray[np.float32], low: float, high: float) -> float:
    """Mean squared error of 8-bit storage as an engine does it: integers, a scale and a zero point."""
    scale = (high - low) / 255
    zero = round(-low / scale)
    stored = np.clip(np.round(values.astype(np.float64) / scale) + zero, 0, 255)
    return float(np.mean(((stored - zero) * scale - values) ** 2))


@pytest.mark.parametrize("shape", ["normal", "silu", "uniform"])
def test_the_range_is_the_best_of_all_clips(shape: str) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=20000).astype(np.float32)
    values = {"normal": x, "silu": x / (1 + np.exp(-x)), "uniform": random.uniform(-1, 3, 20000)}[shape]
    values = values.astype(np.float32)
    found = best_range(values)
    low, high = float(values.min()), float(values.max())
    errors = [integer_error(values, low * clip, high * clip) for clip in CLIPS]
    # An integer zero point moves both ends by up to half a step: close to the best, not always the best.
    assert integer_error(values, found.low, found.high) <= 1.05 * min(errors)
    # Half of SiLU's values lie close to its lower end, which a smaller range would cut off.
    assert (found.high < high) == (shape == "normal")


def test_a_layers_ranges_are_those_of_what_it_reads_and_writes() -> None:
    double = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(double.weight, 2.0)
    network = nn.Sequential(double, nn.ReLU(), nn.Conv2d(1, 1, 1))
    grid = np.linspace(-100, 155, 256, dtype=np.float32).reshape(1, 1, 16, 16)
    found = calibrate(network, ["0"], [grid, grid * 0.5])
    assert found.keys() == {"0"}
    assert (found["0"].read, found["0"].written) == (Range(-100.0, 155.0), Range(-200.0, 310.0))
    read_by_last = calibrate(network, ["2"], [grid])["2"].read
    assert read_by_last == Range(0.0, 310.0)


def test_the_same_seed_gives_the_same_ranges_and_hooks_are_gone() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3))
    images = [np.random.default_rng(k).normal(size=(1, 3, 24, 24)).astype(np.float32) for k in range(3)]
    first = calibrate(network, ["0", "2"], images, seed=1)
    assert calibrate(network, ["0", "2"], images, seed=1) == first
    assert calibrate(network, ["0", "2"], images[:1], seed=1) != first
    assert not any(module._forward_hooks for module in network.modules())


def test_one_image_in_twenty_stretches_a_range_only_so_far() -> None:
    """What nearly all images reach is 100 and -100; a value counts up to three times as far out."""
    usual = np.linspace(-100, 100, 201, dtype=np.float32)
    twenty = [usual] * 19
    wild = np.array([-2000.0, -300.0, 5.0, 300.0, 2000.0], np.float32)
    assert within_usual([*twenty, wild]).tolist() == [*np.concatenate(twenty), -300.0, 5.0, 300.0]
    often = within_usual([*twenty[3:], wild, wild, wild, wild])
    assert (often.min(), often.max()) == (-2000.0, 2000.0)
    assert within_usual([np.array([-1.0, 9.0], np.float32)]).tolist() == [-1.0, 9.0]


def test_a_network_that_goes_astray_on_one_image_keeps_its_levels_for_the_others() -> None:
    same = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(same.weight)
    grid = np.linspace(-100, 155, 256, dtype=np.float32).reshape(1, 1, 16, 16)
    images = [grid] * 19 + [grid * 50]
    found = calibrate(nn.Sequential(same), ["0"], images)["0"]
    assert -300 <= found.read.low <= -90
    assert 140 <= found.read.high <= 465
    whole = calibrate(nn.Sequential(same), ["0"], images, plan=QuantizationPlan(ranges="minmax"))["0"]
    assert whole.read == Range(-5000.0, 7750.0)
