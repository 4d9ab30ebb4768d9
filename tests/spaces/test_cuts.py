"""Channel sites that shapes alone would let pass: each network has right ones and wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spaces.apply import apply
from spaces.cuts import that_hold, unequal
from spaces.detectors.base import Detector, Outputs
from spaces.recipe import Prune, Recipe
from spaces.sites import ChannelSite, Member, find_sites
from spaces.testing import DetectorContract
from tests.spaces.toy import ToyDetector

Block = Callable[["Around", Tensor], Tensor]


def conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


class Around(nn.Module):
    """A block of layers between a stem and a tail, the site that is right whatever the block does."""

    def __init__(self, block: Block, read: int = 16, **layers: nn.Module) -> None:
        super().__init__()
        self.stem, self.tail, self.out = conv(3, 16), conv(read, 16), conv(16, 4, 1)
        self.layers, self.block = nn.ModuleDict(layers), block

    def forward(self, images: Tensor) -> Outputs:
        return (self.out(self.tail(self.block(self, self.stem(images).relu())).relu()),)


def non_local(net: Around, x: Tensor) -> Tensor:
    """Attention whose view takes the number of its input's channels for that of its values."""
    n, c, h, w = x.shape
    q, k, v = (net.layers[name](x).flatten(2) for name in "qkv")
    seen = (v @ (q.transpose(1, 2) @ k / 4).softmax(dim=-1).transpose(1, 2)).view(n, c, h, w)
    return x + net.layers["p"](seen)


def selective(net: Around, x: Tensor) -> Tensor:
    """Gates of two branches out of one linear layer, as a chunk (SKNet)."""
    a, b = net.layers["a"](x).relu(), net.layers["b"](x).relu()
    gates = net.layers["g"]((a + b).mean((2, 3))).sigmoid()
    for_a, for_b = (half[:, :, None, None] for half in gates.chunk(2, dim=1))
    return a * for_a + b * for_b


def pixels(net: Around, x: Tensor) -> Tensor:
    return F.pixel_shuffle(net.layers["a"](x), 2)


def padded(net: Around, x: Tensor) -> Tensor:
    """A shortcut from fewer channels, zeros for the rest."""
    found = net.layers["b"](net.layers["a"](x))
    return found + F.pad(net.layers["a"](x), (0, 0, 0, 0, 4, 4))


def shuffled(net: Around, x: Tensor) -> Tensor:
    x = net.layers["a"](x)
    n, c, h, w = x.shape
    return x.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)


def channels_last(net: Around, x: Tensor) -> Tensor:
    """Gates out of all positions, flattened with the channels last."""
    rows = F.adaptive_avg_pool2d(net.layers["a"](x), 2).permute(0, 2, 3, 1).flatten(1)
    return x * net.layers["gate"](rows)[:, :, None, None].sigmoid()


def flipped(net: Around, x: Tensor) -> Tensor:
    return net.layers["a"](x).flip(1)


def shortened(net: Around, x: Tensor) -> Tensor:
    """More features than asked for, the first ones of which are taken (GhostNet)."""
    x = net.layers["a"](x)
    return torch.cat((x, x.square()), dim=1)[:, :24]


def split_by_a_list(net: Around, x: Tensor) -> Tensor:
    """The second half is read twice (C2f)."""
    parts = list(net.layers["a"](x).split((8, 8), 1))
    parts.append(parts[-1] + net.layers["c"](net.layers["b"](parts[-1])))
    return torch.cat(parts, 1)


MADE: dict[str, tuple[Callable[[], Around], set[str]]] = {  # and the sites besides the tail
    "non-local": (lambda: Around(non_local, **{name: conv(16, 16, 1) for name in "qkvp"}), set()),
    "selective": (lambda: Around(selective, a=conv(16, 16), b=conv(16, 16), g=nn.Linear(16, 32)), {"stem"}),
    "pixels": (lambda: Around(pixels, 4, a=conv(16, 16)), {"stem"}),
    "padded": (lambda: Around(padded, a=conv(16, 8), b=conv(8, 16)), {"stem"}),
    "shuffled": (lambda: Around(shuffled, a=conv(16, 16)), {"stem"}),
    "channels last": (lambda: Around(channels_last, a=conv(16, 8), gate=nn.Linear(32, 16)), {"stem"}),
    "flipped": (lambda: Around(flipped, a=conv(16, 16)), {"stem"}),
    "shortened": (lambda: Around(shortened, 24, a=conv(16, 16)), {"stem"}),
    "split": (
        lambda: Around(split_by_a_list, 24, a=conv(16, 16), b=conv(8, 8), c=conv(8, 8)),
        {"stem", "layers.b"},
    ),
}


class Found(ToyDetector):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self.make = make

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make()


@pytest.mark.parametrize("kind", MADE)
def test_only_sites_that_can_lose_channels_alone_are_left(kind: str) -> None:
    make, besides = MADE[kind]
    detector = Found(make)
    network, images = detector.build().eval(), torch.rand(1, 3, 16, 16)
    sites = find_sites(detector, network)
    assert set(sites.channel) == {"tail"} | besides
    for name in sites.channel:
        recipe = Recipe(detector="toy", choices=(Prune(site=name, sparsity=0.25),))
        assert apply(network, recipe, sites).network(images)[0].shape == network(images)[0].shape


def test_weights_of_zero_hide_no_mistake() -> None:
    """The tail of a fresh detector may begin at 0, behind which every pairing looks right."""
    network = MADE["flipped"][0]()
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    assert set(find_sites(Found(MADE["flipped"][0]), network.eval()).channel) == {"stem", "tail"}


def test_a_network_that_takes_only_float32_keeps_its_sites() -> None:
    def single(net: Around, x: Tensor) -> Tensor:
        return flipped(net, x.float())

    def make() -> Around:
        return Around(single, a=conv(16, 16))

    assert set(find_sites(Found(make), Found(make).build().eval()).channel) == {"stem", "tail"}


def test_no_two_sites_lose_equal_shares_in_both_rounds() -> None:
    sites = {str(k): ChannelSite(str(k), 64, ()) for k in range(50)}
    rounds = [unequal(sites, digit, seed=0) for digit in range(2)]
    counts = [tuple(len(kept[name]) for kept in rounds) for name in sites]
    assert len(set(counts)) == len(sites)
    assert all(0 < count < 64 for pair in counts for count in pair)


def test_indices_beyond_a_layer_are_refused() -> None:
    detector = ToyDetector()
    network = detector.build()
    site = find_sites(detector, network).channel["wide.0"]
    beyond = replace(
        site, members=(*site.members, Member("left.0", "in", tuple(range(32)), tuple(range(32))))
    )
    assert that_hold(network, {"wide.0": site, "beyond": beyond}, (16, 16)) == {"wide.0": site}


class _Contract(DetectorContract):
    pass


def test_the_contract_finds_channels_that_are_paired_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    detector: Detector = ToyDetector()
    sites = find_sites(detector, detector.build())
    check = _Contract().test_every_site_loses_channels_by_itself_and_nothing_else_changes
    check(detector)
    *others, last = sites.channel["wide.0"].members
    wrong = replace(sites.channel["wide.0"], members=(*others, replace(last, roots=last.roots[::-1])))
    broken = replace(sites, channel={**sites.channel, "wide.0": wrong})
    monkeypatch.setattr("spaces.testing.find_sites", lambda *_: broken)
    with pytest.raises(AssertionError, match="cannot lose channels by themselves: wide"):
        check(detector)
