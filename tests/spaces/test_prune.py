from __future__ import annotations

import pytest
import torch
from torch import nn

from spaces.apply import apply
from spaces.methods.prune import importance, kept_channels, sparsities
from spaces.recipe import Prune, Recipe
from spaces.sites import find_sites
from tests.spaces.toy import ToyDetector


@pytest.mark.parametrize(
    ("channels", "left"),
    [
        (64, [64, 56, 48, 40, 32, 24, 16, 8]),
        (24, [24, 16, 8]),
        (20, [20, 16, 8]),  # the first step takes what is no whole granule
        (8, [8]),
        (4, [4]),
        (256, [256, 224, 192, 160, 128, 96, 64, 32]),
        (112, [112, 96, 80, 64, 48, 32, 16]),
    ],
)
def test_steps_leave_whole_granules(channels: int, left: list[int]) -> None:
    assert [kept_channels(channels, s) for s in sparsities(channels, 8)] == left


@pytest.mark.parametrize("channels", range(1, 300))
def test_steps_stay_within_their_limits(channels: int) -> None:
    found = sparsities(channels, 8)
    assert found[0] == 0.0
    assert found == sorted(set(found))
    assert len(found) <= 8
    assert found[-1] <= 0.875
    assert all(kept_channels(channels, s) % 8 == 0 for s in found[1:])


def test_channels_that_are_always_zero_go_without_a_trace() -> None:
    """Removing dead channels must not change an output: the strongest check of indices and dependencies."""
    detector = ToyDetector()
    network = detector.build().eval()
    dead = {"stem.1": [1, 4, 7, 8, 9, 12, 13, 15], "right.1": [0, 5, 6, 7, 11, 12, 20, 23]}
    dead["left.1"] = dead["stem.1"]
    dead["wide.1"] = [2, 3, 5, 8, 13, 21, 30, 31]
    dead["thin.1"] = [*dead["stem.1"], *(16 + c for c in dead["right.1"])]
    for name, channels in dead.items():
        norm = network.get_submodule(name)
        assert isinstance(norm, nn.BatchNorm2d)
        with torch.no_grad():
            norm.weight[channels] = 0.0
            norm.bias[channels] = 0.0
    statistics = {
        name: module.weight.detach().abs() for name, module in network.named_modules() if name in dead
    }
    sites = find_sites(detector, network)
    recipe = Recipe(
        detector="toy",
        choices=(
            Prune(site="stem.0", sparsity=0.5),
            Prune(site="right.0", sparsity=round(8 / 24, 6)),
            Prune(site="wide.0", sparsity=0.25),
        ),
    )
    draft = apply(network, recipe, sites, statistics)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(draft.network(images)[0], network(images)[0], rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in draft.network.parameters()) < sum(p.numel() for p in network.parameters())
    left = draft.channels["thin.0"].out
    assert left is not None
    assert not set(left) & set(dead["thin.1"])


def test_magnitude_by_hand() -> None:
    detector = ToyDetector()
    network = detector.build()
    site = find_sites(detector, network).channel["wide.0"]
    # Members: wide.0 (filters), wide.1 (scale of the norm), out (what reads the channels).
    conv, norm, out = (network.get_submodule(name) for name in ("wide.0", "wide.1", "out"))
    with torch.no_grad():
        conv.weight.fill_(0.0)
        conv.weight[:, 0] = torch.arange(1.0, 33.0).view(32, 1, 1)
        norm.weight.fill_(2.0)
        out.weight.fill_(0.5)
    scores = importance(site, network, {})
    mean = 33 / 2
    expected = [c / mean + 1 + 1 for c in range(1, 33)]  # each member is scaled to a mean of 1
    assert scores.tolist() == pytest.approx(expected)


def test_statistics_take_the_place_of_magnitude() -> None:
    detector = ToyDetector()
    network = detector.build()
    sites = find_sites(detector, network)
    wanted = torch.zeros(32, dtype=torch.float64)
    wanted[[3, 5, 17, 18, 19, 20, 30, 31]] = 1.0
    draft = apply(
        network,
        Recipe(detector="toy", choices=(Prune(site="wide.0", sparsity=0.75),)),
        sites,
        {"wide.1": wanted},
    )
    assert draft.channels["wide.0"].out == (3, 5, 17, 18, 19, 20, 30, 31)
    assert draft.channels["out"].into == (3, 5, 17, 18, 19, 20, 30, 31)
