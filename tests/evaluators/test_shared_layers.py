"""A convolution that levels share, with a norm for each (RTMDet's head): in the file, a layer for each."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluators.calibration import calibrate
from evaluators.kernels import unchosen
from evaluators.passing import norms_behind
from evaluators.pipeline import CandidateWorker
from evaluators.qat import FakeQuantized, as_plain
from spaces.detectors.folding import by_module, folded


class Level(nn.Module):
    def __init__(self, conv: nn.Conv2d, gain: float) -> None:
        super().__init__()
        self.conv, self.norm = conv, nn.BatchNorm2d(8)
        nn.init.constant_(self.norm.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return x.relu()


class Head(nn.Module):
    """Two levels of one convolution, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.stem = nn.Conv2d(3, 8, 1)
        self.levels = nn.ModuleList([Level(conv, 0.1), Level(conv, 4.0)])
        self.own = Level(nn.Conv2d(8, 8, 1, bias=False), 1.0)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(images).relu()
        return tuple(level(x) for level in (*self.levels, self.own))


SHARED = "levels.0.conv"
IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def head() -> Head:
    torch.manual_seed(0)
    return Head().eval()


def test_what_holds_for_a_layer_holds_for_its_copies() -> None:
    network = head()
    bits = {"stem": 32, SHARED: 8, "own.conv": 16}
    assert by_module(network, folded(network), bits) == bits | {"levels.1.conv": 8}
    assert by_module(network, network, bits) == bits, "a layer of two names is one as long as it is shared"
    alike = folded(network)
    alike.levels[1] = alike.levels[0]
    assert by_module(network, alike, bits) == bits


def test_a_shared_layer_has_the_norms_of_all_its_levels() -> None:
    network = head()
    found = norms_behind(network, folded(network), ["stem", SHARED, "own.conv"], IMAGE)
    assert found == {
        SHARED: (network.levels[0].norm, network.levels[1].norm),
        "own.conv": (network.own.norm,),
    }


@torch.no_grad()
def test_no_level_rounds_by_the_gain_of_another() -> None:
    network = head()
    simplified, before = folded(network), network(IMAGE)
    ranges = calibrate(simplified, ["stem", SHARED, "own.conv"], [IMAGE.numpy()])
    fake = FakeQuantized(network, simplified, ranges, IMAGE, weight_levels=127)
    assert fake.layers == ("stem", "own.conv")
    for rounded, exact in zip(network(IMAGE), before, strict=True):
        assert 0 < (rounded - exact).std() / exact.std() < 0.03
    assert fake.removed().keys() == {"stem", "own.conv"}


def test_a_file_runs_every_copy_as_chosen(
    make_worker: Callable[..., CandidateWorker], tmp_path: Path
) -> None:
    """Also where ranges were learned, which those of copies are not."""
    bench = make_worker().bench
    first, second = (bench.base.get_submodule(f"head.cls_convs.{k}.0") for k in (0, 1))
    second.conv = first.conv
    assert "head.cls_convs.1.0.conv" not in bench.sites.facts
    bits = dict.fromkeys(bench.sites.facts, 8)
    for known in (None, as_plain(bench.ranges(bench.base, list(bits)))):
        model, card = bench.export(bench.base, bits, bench.identity, tmp_path, known)
        kernels = bench.target.prepare(model, 1, card.runtime.hint).kernels()
        assert set(unchosen(bits, kernels, bench.base)) == {"head.cls_convs.1.0.conv"}
        assert set(kernels.values()) == {"i8"}
