"""Networks made of what no shipped family has: what cannot be changed is left alone, and nothing crashes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import shufflenet_v2_x0_5

from evaluators.calibration import calibrate
from evaluators.postprocess import WholeDetector
from evaluators.targets.base import Target
from evaluators.targets.registry import target_named
from spaces.apply import apply
from spaces.capabilities import Capabilities
from spaces.detectors.base import Category, Outputs, Postprocess
from spaces.detectors.folding import folded
from spaces.detectors.layout import takes_channels_last
from spaces.detectors.own import built
from spaces.methods.factorize import Factorization
from spaces.recipe import Prune, Recipe
from spaces.sites import find_sites
from tests.spaces.toy import ToyDetector


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups)


class Plain(nn.Module):
    """No norms, functions instead of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(3, 16), conv(16, 24), conv(24, 4, 1)

    def forward(self, x: Tensor) -> Outputs:
        return (self.out(F.relu(self.b(F.silu(self.a(x))))),)


class Grouped(nn.Module):
    """Groups of several channels, and a depthwise convolution with two outputs a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = conv(3, 16), conv(16, 32, groups=4), conv(32, 16), conv(32, 4, 1)
        self.norm, self.twice = nn.BatchNorm2d(32), conv(16, 32, groups=16)

    def forward(self, x: Tensor) -> Outputs:
        return (self.out(self.twice(self.c(self.norm(self.b(self.a(x))).relu()))),)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = conv(3, 16, stride=2), conv(16, 32), conv(16, 16), conv(16, 4, 1)
        self.up, self.norm = nn.ConvTranspose2d(32, 16, 2, stride=2), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Outputs:
        return (self.out(self.c(self.norm(self.up(self.b(self.a(x)).relu())).relu())),)


class SharedHead(nn.Module):
    """One head over two levels, with norms over groups of 4 and of 2 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 16, stride=2), conv(16, 16, stride=2)
        self.tower = nn.Sequential(
            conv(16, 16), nn.GroupNorm(4, 16), nn.SiLU(), conv(16, 24), nn.GroupNorm(12, 24), nn.SiLU()
        )
        self.out = conv(24, 4, 1)

    def forward(self, x: Tensor) -> Outputs:
        a = self.a(x).relu()
        return tuple(self.out(self.tower(level)) for level in (a, self.b(a).relu()))


class Linears(nn.Module):
    """Gates out of pooled features, and a linear layer over all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 16, stride=2), conv(16, 16)
        self.down, self.up = nn.Linear(16, 24), nn.Linear(24, 16)
        self.big, self.out = nn.Linear(16 * 64, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Outputs:
        a = self.a(x).relu()
        gates = self.up(self.down(a.mean((2, 3))).relu()).sigmoid()
        b = self.b(a * gates[:, :, None, None]).relu()
        return (self.out(self.big(b.flatten(1)).relu()),)


class Odd(nn.Module):
    """Channels that are no multiples of anything."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = conv(3, 7), conv(7, 13), conv(20, 5), conv(5, 4, 1)
        self.norm = nn.BatchNorm2d(13)

    def forward(self, x: Tensor) -> Outputs:
        a = self.a(x).relu()
        return (self.out(self.c(torch.cat((a, self.norm(self.b(a)).relu()), dim=1))),)


class Functional(nn.Module):
    """Chunks, gated units, fixed slices, pixels out of channels, a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 32), conv(16, 32), conv(16, 32), conv(16, 64)
        self.out, self.scale = conv(16, 4, 1), nn.Parameter(torch.ones(1, 16, 1, 1))

    def forward(self, x: Tensor) -> Outputs:
        a, b = self.a(x).chunk(2, dim=1)
        c = F.glu(self.b(a * b.sigmoid()), dim=1)
        d = F.pixel_shuffle(self.d(self.c(F.avg_pool2d(c, 2))[:, 16:]), 2)
        return (self.out(d * self.scale + c),)


class Shuffled(nn.Module):
    """Half of the channels pass by, then the halves are interleaved (ShuffleNet V2)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = conv(3, 16), conv(8, 8), conv(16, 16), conv(16, 4, 1)

    def forward(self, x: Tensor) -> Outputs:
        x = self.a(x).relu()
        x = torch.cat((x[:, :8], self.b(x[:, 8:])), dim=1)
        return (self.out(self.c(x.unflatten(1, (2, 8)).transpose(1, 2).flatten(1, 2))),)


class TorchvisionShuffle(nn.Module):
    """torchvision's ShuffleNetV2, for which torch-pruning divides by the channels that it does not know."""

    def __init__(self) -> None:
        super().__init__()
        whole = shufflenet_v2_x0_5(weights=None)
        self.stem, self.stage, self.out = whole.conv1, whole.stage2, conv(48, 4, 1)

    def forward(self, x: Tensor) -> Outputs:
        return (self.out(self.stage(self.stem(x))),)


class Norms(nn.Module):
    """Norms and activations with weights of their own that slicing does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = conv(3, 16), conv(16, 16), conv(16, 16), conv(16, 4, 1)
        self.instance, self.slopes = nn.InstanceNorm2d(16, affine=True), nn.PReLU(16)
        self.layer = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Outputs:
        x = self.slopes(self.instance(self.a(x)))
        x = self.layer(self.b(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return (self.out(self.c(x).relu()),)


class Attention(nn.Module):
    """Attention over positions: products of activations, layers that are called as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = conv(3, 16, stride=4), nn.Linear(16, 4)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.heads = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Outputs:
        x = self.a(x).flatten(2).transpose(1, 2)
        x = x + (self.q(x) @ self.k(x).transpose(1, 2) / 4).softmax(dim=-1) @ self.v(x)
        x = x + self.heads(x, x, x, need_weights=False)[0]
        return (self.out(x).transpose(1, 2),)


class ConvolutionalHeads(nn.Module):
    """Attention of YOLO's kind: two heads out of one convolution, by a view and a split of fixed sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(3, 16, stride=2), conv(16, 24), conv(24, 4, 1)
        self.qkv, self.project = conv(16, 32, 1), conv(16, 16, 1)

    def forward(self, x: Tensor) -> Outputs:
        x = self.a(x).relu()
        n, _, h, w = x.shape
        q, k, v = self.qkv(x).view(n, 2, 16, h * w).split([4, 4, 8], dim=2)
        seen = v @ (q.transpose(2, 3) @ k / 2).softmax(dim=-1).transpose(2, 3)
        return (self.out(self.b(x + self.project(seen.view(n, 16, h, w))).relu()),)


class UnboundHeads(nn.Module):
    """The same by a reshape and an unbind, in a module of its own that insists on its channels."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.project = conv(16, 48, 1), conv(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            n, c, h, w = x.shape
            assert c == 16
            q, k, v = self.qkv(x).reshape(n, 3, 2, 8, h * w).unbind(1)
            seen = v @ (q.transpose(2, 3) @ k / 3).softmax(dim=-1).transpose(2, 3)
            return x + self.project(seen.reshape(n, c, h, w))

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 12, stride=2), conv(12, 16), conv(16, 24)
        self.heads, self.out = self.Heads(), conv(24, 4, 1)

    def forward(self, x: Tensor) -> Outputs:
        return (self.out(self.c(self.heads(self.b(self.a(x).relu()).relu())).relu()),)


class AreaHeads(nn.Module):
    """Attention within a quarter of the positions, on a half of the channels; torch-pruning raises on it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(3, 32, stride=2), conv(32, 24), conv(24, 4, 1)
        self.qkv, self.around, self.project = conv(16, 32, 1), conv(16, 16, groups=16), conv(16, 16, 1)

    def forward(self, x: Tensor) -> Outputs:
        rest, x = self.a(x).relu().split((16, 16), dim=1)
        n, _, h, w = x.shape
        qkv = self.qkv(x).flatten(2).transpose(1, 2)
        qkv = torch.cat((qkv, qkv[:, :, :16]), dim=2).reshape(n * 4, h * w // 4, 48)
        heads = qkv.view(n * 4, h * w // 4, 4, 12).permute(0, 2, 3, 1)
        q, k, v = heads.split([4, 4, 4], dim=2)
        seen = v @ (q.transpose(2, 3) @ k / 2).softmax(dim=-1).transpose(2, 3)
        seen = seen.permute(0, 3, 1, 2).reshape(n, h * w, 16).transpose(1, 2).view(n, 16, h, w)
        x = x + self.project(seen + self.around(x))
        return (self.out(self.b(torch.cat((rest, x), dim=1)).relu()),)


class Unseen(ToyDetector):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self.make = make

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make()

    def decode(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        flat = torch.cat([output.reshape(len(output), 4, -1) for output in outputs], dim=2).transpose(1, 2)
        corner = flat[..., :2].sigmoid() * 8
        return torch.cat((corner, corner + 2), dim=2), flat[..., :1].sigmoid()

    def simplified(self, network: nn.Module) -> nn.Module:
        return folded(network)


FREE = {  # channel sites by hand: what must be found is as important as what must not
    Plain: {"a": 16, "b": 24},
    Grouped: {},
    Transposed: {"a": 16, "c": 16},
    SharedHead: {"a": 16, "tower.0": 4, "tower.3": 12},  # groups of the norms
    Linears: {"a": 16, "down": 24, "b": 16, "big": 32},
    Odd: {"a": 7, "b": 13, "c": 5},
    Functional: {"c": 16},
    Shuffled: {"c": 16},
    TorchvisionShuffle: {"stem.0": 24, **{f"stage.{k}.branch2.0": 24 for k in range(4)}},
    Norms: {"c": 16},
    Attention: {},
    ConvolutionalHeads: {
        "a": 16,
        "b": 24,
    },  # what comes in and what is added, but not what the heads are made of
    UnboundHeads: {"a": 12, "c": 24},
    AreaHeads: {"b": 24},
}


@pytest.fixture(params=list(FREE))
def detector(request: pytest.FixtureRequest) -> Unseen:
    return Unseen(request.param)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
def test_what_can_be_pruned_is_found_and_the_rest_left_alone(detector: Unseen) -> None:
    network, images = detector.build().eval(), torch.rand(1, 3, 16, 16)
    sites = find_sites(detector, network)
    assert {name: site.channels for name, site in sites.channel.items()} == FREE[detector.make]  # type: ignore[index]
    choices = tuple(Prune(site=name, sparsity=0.4) for name in sites.channel)
    whole = [o.shape for o in network(images)]
    for chosen in (*((choice,) for choice in choices), choices):
        pruned = apply(network, Recipe(detector="toy", choices=chosen), sites).network
        assert [o.shape for o in pruned(images)] == whole


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
@pytest.mark.parametrize("make", [Plain, Linears, Functional, Shuffled, ConvolutionalHeads, UnboundHeads])
def test_channels_that_are_always_zero_go_without_a_trace(make: Callable[[], nn.Module]) -> None:
    """Indices through flattening, slices, shuffles, past attention: wrong ones would change the outputs."""
    detector = Unseen(make)
    for name, site in find_sites(detector, detector.build()).channel.items():
        network, images = detector.build().eval(), torch.rand(1, 3, 16, 16)
        dead = {1, 2, site.channels - 3, site.channels - 1}
        for member in site.members:
            if member.side == "out":
                layer = network.get_submodule(member.layer)
                gone = [c for c, root in zip(member.channels, member.roots, strict=True) if root in dead]
                with torch.no_grad():
                    layer.weight[gone] = 0.0
                    layer.bias[gone] = 0.0
        recipe = Recipe(detector="toy", choices=(Prune(site=name, sparsity=4 / site.channels),))
        scores = {
            m.layer: network.get_submodule(m.layer).weight.detach().flatten(1).norm(dim=1)
            for m in site.members
            if m.side == "out"
        }
        pruned = apply(network, recipe, find_sites(detector, network), scores).network
        torch.testing.assert_close(pruned(images), network(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [ConvolutionalHeads, UnboundHeads, AreaHeads])
def test_layers_of_attention_take_bit_widths_and_what_is_lost_in_it_stays(
    make: Callable[[], nn.Module],
) -> None:
    detector = Unseen(make)
    network = detector.build()
    sites = find_sites(detector, network)
    assert {layer for site in sites.layer.values() for layer in site.layers} == set(sites.facts)
    inner = {name for name in sites.facts if name.endswith(("qkv", "project"))}
    assert len(inner) == 2
    cut = {(m.layer.rpartition(".")[2], m.side) for site in sites.channel.values() for m in site.members}
    assert not cut & {("qkv", "out"), ("project", "in")}


def test_attention_that_is_named_as_opaque_leaves_the_same_sites() -> None:
    class Named(Unseen):
        def opaque_modules(self, network: nn.Module) -> tuple[str, ...]:
            return ("heads",)

    found = [find_sites(one, one.build()).channel for one in (Named(UnboundHeads), Unseen(UnboundHeads))]
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch"])
def test_every_bit_width_is_exported_and_runs(detector: Unseen, engine: str, tmp_path: Path) -> None:
    network, images = detector.build().eval(), torch.rand(1, 3, 16, 16)
    layers = list(find_sites(detector, network).facts)
    whole = WholeDetector(
        detector.simplified(network), detector, Postprocess(score_threshold=0.0), [Category(7, "thing")]
    ).eval()
    target: Target = target_named(engine)
    ranges = calibrate(whole.network, layers, [images.numpy()])
    with torch.no_grad():
        wanted = whole(images)[1].numpy()
    for width in target.capabilities.bit_widths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = target.write(whole, dict.fromkeys(layers, width), ranges, tmp_path / str(width))
        found = target.prepare(written.model, 1, written.hint).run(images.numpy()).scores
        np.testing.assert_allclose(found[:1], wanted[:1], atol=1e-4 if width == 32 else 0.05)


class Tied(nn.Module):
    """A layer under two names, and a transformer's, which reads the weights of its layers itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.t1, self.b, self.out = conv(3, 64), conv(64, 64), conv(64, 64), conv(64, 4, 1)
        self.t2 = self.t1
        self.body = nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Outputs:
        a = self.t2(self.b(self.t1(self.a(x).relu()).relu()).relu()).relu()
        rows = self.body(a.flatten(2).transpose(1, 2)).transpose(1, 2)
        return (self.out(rows.reshape(a.shape)),)


def test_layers_that_cannot_be_replaced_keep_their_rank() -> None:
    detector = ToyDetector()
    sites = find_sites(detector, Tied().eval())
    ranks = Factorization().options(sites, Capabilities(bit_widths=(32,), channel_granule=8))
    layers = {layer for site in ranks for layer in sites.layer[site].layers}
    assert "b" in layers
    assert not layers & {"t1", "t2", "body.linear1", "body.linear2"}


class Flat(nn.Module):
    """A context vector out of all positions: `view` needs channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.squeeze, self.out = conv(3, 16), conv(16, 2, 1), conv(16, 4, 1)
        self.gate = nn.Linear(2 * 16 * 16, 16)

    def forward(self, x: Tensor) -> Outputs:
        a = self.a(x)
        gate = self.gate(self.squeeze(a).view(len(a), -1)).sigmoid()
        return (self.out(a * gate[:, :, None, None]),)


class FlatDetector(ToyDetector):
    def build(self) -> nn.Module:
        return Flat()


def test_a_network_that_needs_channels_first_gets_them() -> None:
    images = torch.randn(2, 3, 16, 16)
    last = images.contiguous(memory_format=torch.channels_last)
    assert takes_channels_last(ToyDetector().build(), (16, 16))
    assert not takes_channels_last(Flat(), (16, 16))
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        Flat()(last)
    network = built("mine.py:Mine", FlatDetector())
    assert torch.equal(network(last)[0], network(images)[0])
    again = copy.deepcopy(network)  # as candidates are made
    assert torch.equal(again(last)[0], network(images)[0])
