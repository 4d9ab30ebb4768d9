from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from spaces.apply import apply
from spaces.capabilities import Capabilities
from spaces.detectors.base import Outputs
from spaces.errors import InputError
from spaces.methods.factorize import Factorization
from spaces.recipe import Prune, Recipe
from spaces.sites import find_sites
from tests.spaces.toy import ToyDetector, ToyNetwork, block


def test_dependency_groups_of_a_network_known_by_heart() -> None:
    detector = ToyDetector()
    sites = find_sites(detector, detector.build())
    # The sum joins stem and left; the concatenation hands both sites on to `thin` and `wide`.
    assert {name: site.channels for name, site in sites.channel.items()} == {
        "stem.0": 16,
        "right.0": 24,
        "wide.0": 32,
    }
    members = {(m.layer, m.side): (m.channels[0], len(m.channels)) for m in sites.channel["right.0"].members}
    assert members == {
        ("right.0", "out"): (0, 24),
        ("right.1", "out"): (0, 24),
        ("thin.0", "out"): (16, 24),  # depthwise: channels 16.. of what is concatenated
        ("thin.1", "out"): (16, 24),
        ("wide.0", "in"): (16, 24),
    }


def test_output_layers_keep_their_channels() -> None:
    detector = ToyDetector()
    sites = find_sites(detector, detector.build())
    assert not any(m.layer == "out" and m.side == "out" for s in sites.channel.values() for m in s.members)


def test_a_depthwise_layer_shares_the_bit_width_of_its_reader() -> None:
    detector = ToyDetector()
    sites = find_sites(detector, detector.build())
    assert sites.layer["wide.0"].layers == ("thin.0", "wide.0")
    assert sorted(layer for s in sites.layer.values() for layer in s.layers) == sorted(sites.facts)


def test_siblings_are_joined_where_sites_would_be_too_many() -> None:
    detector = ToyDetector()
    sites = find_sites(detector, detector.build(), max_sites=6)
    assert sites.layer["wide"].layers == ("thin.0", "wide.0")
    assert sorted(layer for s in sites.layer.values() for layer in s.layers) == sorted(sites.facts)


@pytest.mark.parametrize(
    "error", [AssertionError(), KeyError(16), AttributeError("norm16"), ZeroDivisionError()]
)
def test_a_layer_stays_whole_without_whose_channels_the_users_code_fails(error: Exception) -> None:
    class Insists(ToyNetwork):
        def forward(self, images: Tensor) -> Outputs:
            self.wide.register_forward_hook(self.look)
            return super().forward(images)

        def look(self, module: nn.Module, read: object, written: Tensor) -> None:
            if written.shape[1] != 32:
                raise error

    detector = ToyDetector()
    assert set(find_sites(detector, Insists()).channel) == {"stem.0", "right.0"}


def test_a_frozen_base_has_the_same_sites() -> None:
    detector = ToyDetector()
    free, frozen = detector.build(), detector.build().requires_grad_(False)
    assert find_sites(detector, frozen).channel == find_sites(detector, free).channel


def test_predicted_widths_are_those_of_the_pruned_network() -> None:
    detector = ToyDetector()
    network = detector.build()
    sites = find_sites(detector, network)
    kept = {"stem.0": 8, "right.0": 16, "wide.0": 24}
    choices = tuple(Prune(site=s, sparsity=1 - k / sites.channel[s].channels) for s, k in kept.items())
    pruned = apply(network, Recipe(detector="toy", choices=choices), sites).network
    found = {
        name: (m.in_channels, m.out_channels)
        for name, m in pruned.named_modules()
        if isinstance(m, torch.nn.Conv2d)
    }
    assert found == sites.widths(kept)
    assert found == {
        "stem.0": (3, 8),
        "left.0": (8, 8),
        "right.0": (8, 16),
        "thin.0": (24, 24),
        "wide.0": (24, 24),
        "out": (24, 4),
    }


def test_macs_by_hand() -> None:
    detector = ToyDetector()
    facts = find_sites(detector, detector.build()).facts
    assert facts["stem.0"].macs(3, 16) == 16 * 3 * 9 * 16 * 16
    assert facts["thin.0"].macs(40, 40) == 40 * 9 * 16 * 16
    assert facts["thin.0"].macs(24, 24) == 24 * 9 * 16 * 16


class Odd(ToyNetwork):
    """The toy with something in it that is not a plain layer called in the plain way."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        wide = self.wide[0]
        if kind == "spectral norm":
            parametrizations.spectral_norm(wide)
        elif kind == "weight norm":
            parametrizations.weight_norm(wide)
        elif kind == "no way back":
            parametrize.register_parametrization(wide, "weight", Halved())
        elif kind == "whole numbers":
            self.levels = nn.Parameter(torch.arange(4), requires_grad=False)
        elif kind == "own class":
            self.wide[0] = Centred(40, 32, 1, bias=False)

    def forward(self, images: Tensor) -> Outputs:
        if self.kind == "unbatched":
            return (torch.stack([self.out(one) for one in self._features(images)]),)
        if self.kind == "keyword":
            return (self.out(input=self._features(images)),)
        if self.kind == "read weight":
            return (
                self.out(self._features(images)) + F.conv2d(self.stem(images), self.right[0].weight)[:, :4],
            )
        return (self.out(self._features(images)),)

    def _features(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = x + self.left(x)
        found: Tensor = self.wide(self.thin(torch.cat((x, self.right(x)), dim=1)))
        return found


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Centred(nn.Conv2d):
    """Computes with other weights than it holds (weight standardisation)."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    ("kind", "lost"),
    [
        ("plain", set()),
        ("spectral norm", {"stem.0", "right.0", "wide.0"}),
        ("weight norm", set()),
        ("no way back", {"stem.0", "right.0", "wide.0"}),
        ("whole numbers", set()),
        ("unbatched", set()),
    ],
)
def test_what_cannot_be_sliced_is_left_alone(kind: str, lost: set[str]) -> None:
    sites = find_sites(ToyDetector(), Odd(kind).eval())
    assert set(sites.channel) == {"stem.0", "right.0", "wide.0"} - lost
    assert (sites.facts["out"].read, sites.facts["out"].written) == ((16, 16), (16, 16))
    network = Odd(kind).eval()
    choices = tuple(Prune(site=name, sparsity=0.5) for name in sites.channel)
    pruned = apply(network, Recipe(detector="toy", choices=choices), sites).network
    assert pruned(torch.rand(1, 3, 16, 16))[0].shape == (1, 4, 16, 16)


class Stacked(nn.Module):
    """Three maps of one pyramid in one, below or beside one another, then a linear layer over its crop."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.stem = block(3, 16)
        self.levels = nn.ModuleList(nn.Conv2d(16, 12, 1) for _ in range(3))
        self.crop = nn.AdaptiveAvgPool2d(4)
        self.first, self.out = nn.Linear(12 * 16, 32), nn.Linear(32, 4)

    def forward(self, images: Tensor) -> Outputs:
        stem = self.stem(images)
        maps = torch.cat([level(stem) for level in self.levels], dim=self.dim)
        return (self.out(self.first(self.crop(maps).flatten(1)).relu())[:, :, None, None],)


@pytest.mark.parametrize("dim", [2, 3])
def test_maps_below_one_another_have_the_channels_of_one(dim: int) -> None:
    sites = find_sites(ToyDetector(), Stacked(dim).eval())
    assert {name: site.channels for name, site in sites.channel.items()} == {
        "stem.0": 16,
        "levels.0": 12,
        "first": 32,
    }
    members = {(m.layer, m.side): len(m.channels) for m in sites.channel["levels.0"].members}
    assert members == {**{(f"levels.{k}", "out"): 12 for k in range(3)}, ("first", "in"): 12 * 16}


def test_a_layer_that_is_called_by_keyword_is_named() -> None:
    with pytest.raises(InputError, match=r"model: 'out': is called with input=\.\.\.; call layers without"):
        find_sites(ToyDetector(), Odd("keyword").eval())


@pytest.mark.parametrize(
    ("kind", "whole"),
    [("plain", set()), ("weight norm", set()), ("own class", {"wide.0"}), ("read weight", {"right.0"})],
)
def test_layers_that_are_more_than_layers_keep_their_rank(kind: str, whole: set[str]) -> None:
    network = Odd(kind).eval()
    sites = find_sites(ToyDetector(), network)
    assert {name for name, facts in sites.facts.items() if not facts.replaceable} == whole
    offered = Factorization().options(sites, Capabilities(channel_granule=1))
    assert {"left.0", "right.0", "wide.0"} - offered.keys() == whole
    factorised = apply(network, Recipe(detector="toy", choices=tuple(c[-1] for c in offered.values())), sites)
    assert factorised.network(torch.rand(1, 3, 16, 16))[0].shape == (1, 4, 16, 16)
