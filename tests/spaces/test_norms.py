"""Channels behind norms with groups, frozen norms and bare parameters: what may go, what stays the same."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from spaces.apply import apply, rebuild, same_state, save
from spaces.capabilities import Capabilities
from spaces.detectors.base import Outputs
from spaces.detectors.folding import folded
from spaces.methods.prune import Pruning
from spaces.norms import in_whole_groups
from spaces.recipe import Prune, Recipe
from spaces.sites import find_sites
from tests.spaces.toy import ToyDetector


class Tower(nn.Module):
    """A frozen norm, a bare scale, a norm over groups of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.frozen = nn.Conv2d(3, 16, 3), FrozenBatchNorm2d(16)
        self.scale = nn.Parameter(torch.rand(1, 16, 1, 1) + 0.5)
        self.b, self.groups = nn.Conv2d(16, 64, 3, bias=False), nn.GroupNorm(8, 64)
        self.out = nn.Conv2d(64, 4, 1)
        for values in (self.frozen.weight, self.frozen.running_var, self.groups.weight.data):
            values.uniform_(0.5, 1.5)
        for values in (self.frozen.bias, self.frozen.running_mean, self.groups.bias.data):
            values.normal_(0.0, 0.2)

    def forward(self, x: Tensor) -> Outputs:
        x = self.frozen(self.a(x)).relu() * self.scale
        return (self.out(self.groups(self.b(x)).relu()),)


class Towers(ToyDetector):
    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return Tower()


DETECTOR = Towers()
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_a_group_of_a_norm_is_one_unit() -> None:
    sites = find_sites(DETECTOR, DETECTOR.build())
    assert {name: (s.channels, s.unit) for name, s in sites.channel.items()} == {"a": (16, 1), "b": (8, 8)}
    assert {m.layer for m in sites.channel["a"].members} == {"a", "b", "frozen", "scale"}
    offered = Pruning().options(sites, Capabilities(bit_widths=(32,), channel_granule=8))
    assert [choice.sparsity for choice in offered["b"] if isinstance(choice, Prune)] == [
        k / 8 for k in range(8)
    ]
    assert [choice.sparsity for choice in offered["a"] if isinstance(choice, Prune)] == [0.0, 0.5]


def test_groups_that_stay_compute_what_they_did() -> None:
    network = DETECTOR.build().eval()
    sites = find_sites(DETECTOR, network)
    recipe = Recipe(detector="toy", choices=(Prune(site="b", sparsity=0.375),))
    draft = apply(network, recipe, sites)
    kept = draft.channels["b"].out
    assert kept is not None
    assert len(kept) == 40
    groups = draft.network.get_submodule("groups")
    assert (groups.num_groups, groups.num_channels) == (5, 40)
    gone = [c for c in range(64) if c not in kept]
    assert {c // 8 for c in gone}.isdisjoint({c // 8 for c in kept})
    with torch.no_grad():
        network.get_submodule("out").weight[:, gone] = 0.0
        torch.testing.assert_close(draft.network(IMAGES)[0], network(IMAGES)[0], rtol=1e-4, atol=1e-5)


def test_frozen_norms_and_bare_parameters_lose_their_channels() -> None:
    network = DETECTOR.build().eval()
    dead = [1, 5, 9, 15]
    with torch.no_grad():
        frozen = network.get_submodule("frozen")
        frozen.weight[dead], frozen.bias[dead] = 0.0, 0.0
    sites = find_sites(DETECTOR, network)
    recipe = Recipe(detector="toy", choices=(Prune(site="a", sparsity=0.25),))
    scores = {"frozen": frozen.weight.abs() + frozen.bias.abs()}
    draft = apply(network, recipe, sites, scores)
    assert draft.channels["scale"].out == tuple(c for c in range(16) if c not in dead)
    assert draft.network.get_parameter("scale").shape == (1, 12, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(draft.network(IMAGES)[0], network(IMAGES)[0], rtol=1e-4, atol=1e-5)


def test_they_are_stored_and_made_again_bit_for_bit(tmp_path: Path) -> None:
    network = DETECTOR.build().eval()
    sites = find_sites(DETECTOR, network)
    recipe = Recipe(detector="toy", choices=(Prune(site="a", sparsity=0.5), Prune(site="b", sparsity=0.5)))
    draft = apply(network, recipe, sites)
    save(draft, recipe, tmp_path)
    found, again = rebuild(DETECTOR.build().eval(), tmp_path)
    assert found == recipe
    assert same_state(again.network.state_dict(), draft.network.state_dict())
    with torch.no_grad():
        assert torch.equal(again.network(IMAGES)[0], draft.network(IMAGES)[0])


def test_frozen_norms_are_folded_and_groups_stay() -> None:
    network = DETECTOR.build().eval()
    simple = folded(network)
    assert isinstance(simple.get_submodule("frozen"), nn.Identity)
    assert isinstance(simple.get_submodule("groups"), nn.GroupNorm)
    with torch.no_grad():
        torch.testing.assert_close(simple(IMAGES)[0], network(IMAGES)[0], rtol=1e-4, atol=1e-5)


class WithActivation(nn.BatchNorm2d):
    """As timm has it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Standardized(nn.Conv2d):
    """Computes with another weight than it holds."""

    def forward(self, x: Tensor) -> Tensor:
        spread, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / spread, self.bias)


def test_subclasses_that_compute_something_else_stay() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), WithActivation(8)),
        *(Standardized(8, 8, 3, bias=False), nn.BatchNorm2d(8)),
        *(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)),
    )
    for norm in network[1::2]:
        for values in (norm.weight.data, norm.running_var, norm.running_mean, norm.bias.data):
            values.uniform_(0.5, 1.5)
    simple = folded(network.eval())
    kinds = [type(module) for module in simple.children()]
    assert kinds == [nn.Conv2d, WithActivation, Standardized, nn.BatchNorm2d, nn.Conv2d, nn.Identity]
    with torch.no_grad():
        torch.testing.assert_close(simple(IMAGES), network(IMAGES), rtol=1e-4, atol=1e-5)


def test_units_by_hand() -> None:
    four, every = tuple(range(4)), tuple(range(8))
    norm, whole = nn.GroupNorm(2, 4), nn.GroupNorm(1, 4)
    assert in_whole_groups([(None, four, four)]) == [0, 1, 2, 3]
    assert in_whole_groups([(norm, four, four)]) == [0, 0, 1, 1]
    assert in_whole_groups([(whole, four, four)]) == [0, 1, 2, 3]
    assert in_whole_groups([(norm, (0, 1, 2), (0, 1, 2))]) is None  # the fourth belongs to another site
    both = [(nn.GroupNorm(4, 8), every, every), (nn.GroupNorm(2, 8), every, every)]
    assert in_whole_groups(both) == [0, 0, 0, 0, 1, 1, 1, 1]
    # A layer that reads only some of the units cannot lose them evenly.
    assert in_whole_groups([(norm, four, four), (None, (0, 1), (0, 1))]) is None
