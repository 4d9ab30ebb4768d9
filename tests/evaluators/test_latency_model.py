"""The latency model: its features by hand, and that it recovers latencies that are known exactly."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import spearmanr

from evaluators.latency_model import BOXES, LatencyModel, Reach, features, fit_latency
from spaces.capabilities import Capabilities
from spaces.detectors.yolox import YoloX
from spaces.sites import find_sites
from spaces.space import build_space
from spaces.table import Options, SpaceTable
from tests.spaces.toy import ToyDetector

CPU = Capabilities(bit_widths=(32, 16, 8), channel_granule=8)


@pytest.fixture(scope="module")
def toy() -> SpaceTable:
    detector = ToyDetector()
    return SpaceTable(build_space(detector, find_sites(detector, detector.build()), CPU))


@pytest.fixture(scope="module")
def yolox() -> SpaceTable:
    detector = YoloX("narrow", 3, (64, 64), depth=0.33, width=0.25, depthwise=True)
    return SpaceTable(build_space(detector, find_sites(detector, detector.build()), CPU))


def drawn(table: SpaceTable, count: int, seed: int) -> Options:
    """Recipes of all degrees: in each, every parameter leaves the base with a probability of its own."""
    random = np.random.default_rng(seed)
    options = random.integers(0, table.sizes, (count, len(table.sizes)))
    return np.where(random.random(options.shape) < random.random((count, 1)), options, 0)


def roofline(table: SpaceTable, options: Options) -> NDArray[np.float64]:
    """Latencies of another form than the model's: each layer the longer of computing and moving."""
    shapes = table.shapes(options)
    speed = np.where(shapes.bits == 8, 3.0, np.where(shapes.bits == 16, 1.8, 1.0))
    speed = speed * np.where(table.depthwise, 0.2, 1.0)
    moved = (shapes.inputs + shapes.outputs) * shapes.positions * shapes.bits / 32
    return (np.maximum(shapes.macs / speed, 8.0 * moved) + 500).sum(axis=1)


def test_features_of_a_network_known_by_heart(toy: SpaceTable) -> None:
    base = np.zeros((1, len(toy.names)), np.int64)
    eight = base.copy()
    eight[0, toy.names.index("bits wide.0")] = 2  # the depthwise layer `thin` and `wide` behind it
    whole, mixed = features(toy, toy.shapes(base))[0], features(toy, toy.shapes(eight))[0]
    # Columns: dense, depthwise, written, layers; at 32, 16 and 8 bits; then what dense layers of 8 bits
    # gather, what is read behind casts of int8 and of bf16, and 1.
    macs = {"stem": 16 * 27, "left": 16 * 144, "right": 24 * 16, "thin": 40 * 9, "wide": 32 * 40}
    filled = macs | {"right": 32 * 16, "thin": 48 * 9, "out": 16 * 32}  # whole blocks of 16 channels
    macs["out"] = 4 * 32
    total, dense = sum(macs.values()), sum(v for k, v in filled.items() if k != "thin")
    written = 16 + 16 + 24 + 40 + 32 + 4
    assert whole == pytest.approx([dense / total, 48 / 40, 1, 1, *[0] * 11, 1])
    wide = filled["wide"] / total
    crossing = (40 + 32) / written  # into `thin`, and out of `wide` into `out`
    rest = [(dense - filled["wide"]) / total, 0, (written - 72) / written, 4 / 6]
    ours = [wide, 48 / 40, 72 / written, 2 / 6]
    assert mixed == pytest.approx([*rest, *[0] * 4, *ours, 0, crossing, 0, 1])
    kernels = base.copy()
    kernels[0, toy.names.index("bits left.0")] = 2  # windows of 3 x 3 in 16 channels; `stem` reads 3
    assert features(toy, toy.shapes(kernels))[0, 12] == pytest.approx(16 / (16 + 3))


def test_it_recovers_latencies_of_its_own_form(yolox: SpaceTable) -> None:
    weights = np.array([0.3, 0.1, 0.2, 0.1, 0.2, 0.1, 0.15, 0.1, 0.12, 0.2, 0.1, 0.1, 0.1, 0.05, 0.02, 0.1])
    truth = LatencyModel(yolox, weights, 0.0)
    seen, unseen = drawn(yolox, 80, 0), drawn(yolox, 40, 1)
    model = fit_latency(yolox, seen, truth.predict(seen))
    errors = np.abs(model.predict(unseen) / truth.predict(unseen) - 1)
    assert float(np.median(errors)) < 0.02
    assert model.error < 0.02
    assert (model.weights >= 0).all()


def test_it_predicts_latencies_of_another_form_better_than_macs(yolox: SpaceTable) -> None:
    seen, unseen = drawn(yolox, 60, 2), drawn(yolox, 40, 3)
    base = roofline(yolox, np.zeros((1, len(yolox.names)), np.int64))
    noise = np.random.default_rng(4).normal(1, 0.01, 60)
    model = fit_latency(yolox, seen, roofline(yolox, seen) / base * noise)
    measured, predicted = roofline(yolox, unseen) / base, model.predict(unseen)
    assert float(np.median(np.abs(predicted / measured - 1))) < 0.07
    order = spearmanr(predicted, measured).statistic
    assert order > 0.95
    assert order > spearmanr(yolox.shapes(unseen).macs.sum(1), measured).statistic


def test_its_error_is_that_of_recipes_left_out(yolox: SpaceTable) -> None:
    options = drawn(yolox, 12, 5)
    ratios = roofline(yolox, options) / roofline(yolox, options * 0)
    errors = []
    for k in range(12):
        others = np.arange(12) != k
        without = fit_latency(yolox, options[others], ratios[others])
        errors.append(abs(without.predict(options[[k]])[0] / ratios[k] - 1))
    assert fit_latency(yolox, options, ratios).error == pytest.approx(float(np.median(errors)), abs=1e-9)


def test_what_suppression_takes_is_told_by_recipes_that_differ_in_it_alone() -> None:
    """3 % of the base's time drown in the model's errors of everything else, unless one looks at pairs."""
    detector = YoloX("narrow", 3, (64, 64), depth=0.33, width=0.25, depthwise=True)
    sites = find_sites(detector, detector.build(), topk=1000)
    table = SpaceTable(build_space(detector, sites, CPU, ("prune", "quantize", "topk")))
    at = next(p for p, name in enumerate(table.names) if name.startswith("top-k"))
    options = drawn(table, 17, 3)
    options[:2] = 0
    options[0, at] = table.sizes[at] - 1
    share = table.shapes(options).boxes.sum(axis=1)
    assert share[:2] == pytest.approx([50 / 84, 1.0])  # of 64 + 16 + 4 boxes
    network = roofline(table, options)
    ratios = 0.97 * network / network[1] + 0.03 * share
    assert fit_latency(table, options, ratios).weights[BOXES] == pytest.approx(0.03, rel=0.1)
    assert fit_latency(table, options[1:], ratios[1:]).weights[BOXES] != pytest.approx(0.03, rel=0.5)


def test_it_says_when_it_extrapolates(yolox: SpaceTable) -> None:
    random = np.random.default_rng(6)
    mild = np.where(random.random((40, len(yolox.sizes))) < 0.2, 1, 0)
    model = fit_latency(yolox, mild, np.ones(40))
    assert not model.extrapolates(mild).any()
    assert model.extrapolates(yolox.sizes[None] - 1).all(), "everything at its strongest is far away"
    alike = np.where(random.random((200, len(yolox.sizes))) < 0.2, 1, 0)
    assert model.extrapolates(alike).mean() < 0.1
    assert LatencyModel(yolox, model.weights, 0.0).extrapolates(mild).all(), "where nothing is known"


def test_reach_by_hand() -> None:
    # (X'X) is 8, 8 on the diagonal and 0 beside it, up to the ridge: leverages (a^2 + b^2) / 8, at most 1/2.
    corners = np.array([[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0], [0.0, -2.0]])
    reach = Reach.of(corners)
    assert reach.largest == pytest.approx(0.5, rel=0.01)
    points = np.array([[1.4, 1.4], [1.5, 1.5], [0.0, 0.0], [2.1, 0.0]])
    assert reach.left_by(points).tolist() == [False, True, False, True]
