"""Factors of single layers: exact at full rank, truncated by hand, of the right shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from spaces.detectors.folding import fold, fold_norms
from spaces.layers import LayerFacts, count_macs, frozen_parameters, learning
from spaces.lowrank import Factored, Factors, by_part, errors, factorised, shaped
from spaces.methods.factorize import best_plan
from spaces.ranks import MOST, layer_ranks
from spaces.recipe import Factorize


def seeded(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.eval().requires_grad_(False)


def facts(inputs: int, outputs: int, kernel: int = 1, groups: int = 1, stride: int = 1) -> LayerFacts:
    """Of a layer that reads 8 x 8 positions."""
    side = 8 // stride
    size = (kernel, kernel)
    return LayerFacts("x", inputs, outputs, size, groups, side * side, True, (8, 8), (side, side))


POINTWISE = nn.Conv2d(12, 10, 1, stride=2)
SPATIAL = nn.Conv2d(12, 10, 3, stride=2, padding=2, dilation=2)


@pytest.mark.parametrize(
    ("layer", "plan", "shape"),
    [
        (nn.Linear(12, 10), Factored("svd", (10,)), (5, 12)),
        (nn.Linear(10, 12), Factored("svd", (10,)), (2, 5, 10)),
        (POINTWISE, Factored("svd", (10,)), (2, 12, 7, 9)),
        (SPATIAL, Factored("split", (30,)), (2, 12, 9, 7)),
        (nn.Conv2d(3, 64, 3, padding="same", bias=False), Factored("split", (9,)), (1, 3, 6, 6)),
        (nn.Conv2d(100, 4, 3), Factored("tucker", (36, 4)), (1, 100, 5, 5)),
    ],
)
def test_full_rank_computes_the_same(layer: nn.Module, plan: Factored, shape: tuple[int, ...]) -> None:
    assert isinstance(seeded(layer), nn.Conv2d | nn.Linear)
    factors = factorised(layer, plan)
    x = torch.randn(shape)
    torch.testing.assert_close(factors(x), layer(x), rtol=1e-4, atol=1e-4)
    assert not factors.training
    assert not any(p.requires_grad for p in factors.parameters())


def difference(layer: nn.Conv2d, factors: nn.Module) -> float:
    """Squared norm of what a convolution lost, from its answers to single pixels of single channels."""
    side = 2 * layer.kernel_size[0] + 1
    pixels = torch.zeros(layer.in_channels, layer.in_channels, side, side)
    for channel in range(layer.in_channels):
        pixels[channel, channel, side // 2, side // 2] = 1.0
    return float((layer(pixels) - factors(pixels)).square().sum())


def test_the_error_of_a_truncated_svd_is_the_tail_of_singular_values() -> None:
    layer = seeded(nn.Conv2d(12, 10, 1))
    assert isinstance(layer, nn.Conv2d)
    values = np.linalg.svd(layer.weight.numpy()[:, :, 0, 0].astype(float), compute_uv=False)
    for rank in (1, 4, 9):
        tail = float((values[rank:] ** 2).sum())
        assert errors(layer.weight, {"svd": (rank,)})["svd"] == pytest.approx(tail)
        assert difference(layer, factorised(layer, Factored("svd", (rank,)))) == pytest.approx(tail, rel=1e-4)


def test_the_error_of_a_split_is_the_tail_of_its_matrix() -> None:
    layer = seeded(nn.Conv2d(6, 5, 3, padding=1))
    assert isinstance(layer, nn.Conv2d)
    matrix = np.zeros((6 * 3, 5 * 3))  # rows: input and height, columns: output and width
    for o, i, y, x in np.ndindex(5, 6, 3, 3):
        matrix[i * 3 + y, o * 3 + x] = layer.weight[o, i, y, x]
    tail = float((np.linalg.svd(matrix, compute_uv=False)[7:] ** 2).sum())
    factors = factorised(layer, Factored("split", (7,)))
    assert [tuple(p.shape) for p in factors.parameters() if p.dim() > 1] == [(7, 6, 3, 1), (5, 7, 1, 3)]
    assert errors(layer.weight, {"split": (7,)})["split"] == pytest.approx(tail)
    assert difference(layer, factors) == pytest.approx(tail, rel=1e-4)


def test_tucker_has_three_parts_and_leaves_out_those_of_full_rank() -> None:
    layer = seeded(nn.Conv2d(12, 10, 3, stride=2, padding=1))
    assert isinstance(layer, nn.Conv2d)
    whole = [(4, 12, 1, 1), (6, 4, 3, 3), (10, 6, 1, 1)]
    wanted = {(4, 6): whole, (12, 6): [(6, 12, 3, 3), whole[2]], (4, 10): [whole[0], (10, 4, 3, 3)]}
    for ranks, shapes in wanted.items():
        factors = factorised(layer, Factored("tucker", ranks))
        assert [tuple(m.weight.shape) for m in factors] == shapes
        assert [m.stride for m in factors if m.kernel_size == (3, 3)] == [(2, 2)]
        assert [m.bias is not None for m in factors] == [False] * (len(shapes) - 1) + [True]
    # With one side whole it is the best approximation of the other: the tail of that unfolding.
    unfolded = layer.weight.transpose(0, 1).flatten(1).double().numpy()
    tail = float((np.linalg.svd(unfolded, compute_uv=False)[4:] ** 2).sum())
    assert errors(layer.weight, {"tucker": (4, 10)})["tucker"] == pytest.approx(tail)
    layer = seeded(nn.Conv2d(12, 10, 3, padding=1))
    assert isinstance(layer, nn.Conv2d)
    both = errors(layer.weight, {"tucker": (4, 6)})["tucker"]
    assert difference(layer, factorised(layer, Factored("tucker", (4, 6)))) == pytest.approx(both, rel=1e-4)


def test_shapes_alone_are_those_of_the_factors() -> None:
    for plan in (Factored("tucker", (4, 6)), Factored("split", (7,))):
        made, empty = factorised(SPATIAL, plan), shaped(SPATIAL, plan)
        assert str(made) == str(empty)
        empty.load_state_dict(made.state_dict())
        x = torch.randn(1, 12, 8, 8)
        assert torch.equal(made(x), empty(x))


def test_ranks_by_hand() -> None:
    assert layer_ranks(facts(64, 64), 64, 64, 0.25, 8) == (16, 16, 16 * 128 * 64)
    assert layer_ranks(facts(64, 64), 64, 64, 0.5, 8) is None  # 32 * 128 are no fewer
    assert layer_ranks(facts(64, 64), 48, 64, 0.25, 8) == (16, 16, 16 * 112 * 64)  # a quarter is 12
    spatial = facts(64, 32, kernel=3, stride=2)  # reads 64 positions, writes 16
    first, core, last = 64 * 32 * 64, 32 * 16 * 9 * 16, 16 * 32 * 16
    assert layer_ranks(spatial, 64, 32, 0.5, 8) == (32, 16, first + core + last)
    assert first + core + last <= MOST * 64 * 32 * 9 * 16
    assert layer_ranks(facts(64, 64, kernel=3, groups=64), 64, 64, 0.25, 8) is None
    assert layer_ranks(facts(64, 12, kernel=3), 64, 12, 0.25, 8) is None  # few channels
    assert layer_ranks(facts(64, 64), 64, 64, 1.0, 8) is None


def test_of_both_the_closer_one_is_taken_and_it_multiplies_no_more() -> None:
    layer = seeded(nn.Conv2d(32, 32, 3, padding=1))
    assert isinstance(layer, nn.Conv2d)
    here, choice = facts(32, 32, kernel=3), Factorize(site="x", rank_ratio=0.5)
    tall, wide = torch.randn(16, 32, 3, 1), torch.randn(32, 16, 1, 3)
    separable = torch.einsum("riyu,orux->oiyx", tall, wide)
    small = torch.einsum(
        "ab,bcyx,cd->adyx", torch.randn(32, 16), torch.randn(16, 16, 3, 3), torch.randn(16, 32)
    )
    found = {}
    for name, weight in {"split": separable, "tucker": small}.items():
        layer.weight.data = weight
        plan = best_plan(layer, here, choice)
        assert plan is not None
        found[name] = plan.kind
        budget = layer_ranks(here, 32, 32, 0.5, 8)
        assert budget is not None
        both = nn.Sequential(nn.Conv2d(3, 32, 1), factorised(layer, plan))
        assert count_macs(both, (8, 8)) - 3 * 32 * 64 <= budget[2]
    assert found == {"split": "split", "tucker": "tucker"}


def norm(kind: type[nn.Module]) -> nn.Module:
    made = kind(10)
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(made, name).data.uniform_(0.5, 1.5)
    return made.eval()


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_norms_are_folded_into_the_last_factor(kind: type[nn.Module]) -> None:
    layer = seeded(nn.Conv2d(12, 10, 3, padding=1, bias=False))
    assert isinstance(layer, nn.Conv2d)
    x = torch.randn(1, 12, 6, 6)
    plans = (None, Factored("tucker", (4, 6)), Factored("tucker", (4, 10)), Factored("split", (7,)))
    for plan in plans:
        network = nn.Sequential(layer if plan is None else factorised(layer, plan), norm(kind), nn.ReLU())
        before: Tensor = network(x)
        names = [name for name, m in network.named_modules() if isinstance(m, nn.Conv2d)]
        fold_norms(network.eval())
        assert isinstance(network[1], nn.Identity)
        torch.testing.assert_close(network(x), before, rtol=1e-4, atol=1e-5)
        assert [name for name, m in network.named_modules() if isinstance(m, nn.Conv2d)] == names
    with pytest.raises(TypeError, match="cannot be folded into"):
        fold(nn.ReLU(), norm(kind))


def test_what_holds_for_a_layer_holds_for_its_factors() -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 1), Factors(nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)))
    assert by_part(network, {"0": 32, "1": 8, "gone": 16}) == {"0": 32, "1.0": 8, "1.1": 8}


def test_frozen_parameters_of_a_layer_stay_frozen_in_its_factors() -> None:
    layer = nn.Linear(12, 10)
    network = nn.Sequential(layer, nn.Linear(10, 4))
    layer.weight.requires_grad_(False)
    frozen = frozen_parameters(network)
    assert frozen == {"0.weight"}
    network[0] = factorised(layer, Factored("svd", (2,)))
    learned = [name for name, p in learning(network, frozen).named_parameters() if p.requires_grad]
    assert learned == ["0.1.bias", "1.weight", "1.bias"]
    assert all(p.requires_grad for p in learning(network).parameters())
    assert frozen_parameters(network.requires_grad_(False)) == set()  # made for inference
