"""Layers of low rank: a convolution or linear layer as a sequence of thinner ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

Kind = Literal["svd", "tucker", "split"]
T = TypeVar("T")


@dataclass(frozen=True)
class Factored:
    """How a layer was factorised: all that is needed to make layers of the same shapes.

    Attributes:
        kind: `svd` for two linear or 1x1 layers, `tucker` for 1x1, k x k, 1x1, `split` for k x 1, 1 x k.
        ranks: channels between the factors: one, for `tucker` two. A side of `tucker` whose rank is its
            number of channels has no factor.
    """

    kind: Kind
    ranks: tuple[int, ...]


class Factors(nn.Sequential):
    """In the place of a layer, under its name: the thinner layers that it became, called `0`, `1` ..."""


def by_part(network: nn.Module, layers: Mapping[str, T]) -> dict[str, T]:
    """What holds for layers, by the modules that compute them: themselves, or all of their factors.

    Layers that the network does not have any more are left out.
    """
    modules = dict(network.named_modules())
    found = {}
    for layer, value in layers.items():
        module = modules.get(layer)
        if isinstance(module, Factors):
            found.update({f"{layer}.{name}": value for name, _ in module.named_children()})
        elif module is not None:
            found[layer] = value
    return found


def shaped(layer: nn.Conv2d | nn.Linear, plan: Factored) -> Factors:
    """Factors of the right shapes for a layer, their weights not set, except for the bias."""
    factors = Factors(*(_linear(layer, plan) if isinstance(layer, nn.Linear) else _convs(layer, plan)))
    if layer.bias is not None:
        factors[-1].bias.data = layer.bias.detach().clone()
    return factors.to(layer.weight).requires_grad_(layer.weight.requires_grad).train(layer.training)


def _linear(layer: nn.Linear, plan: Factored) -> list[nn.Module]:
    (rank,) = plan.ranks
    return [
        _empty(nn.Linear, layer.in_features, rank, bias=False),
        _empty(nn.Linear, rank, layer.out_features, bias=layer.bias is not None),
    ]


def _convs(conv: nn.Conv2d, plan: Factored) -> list[nn.Module]:
    inputs, outputs, bias = conv.in_channels, conv.out_channels, conv.bias is not None
    mode, (stride_y, stride_x), (step_y, step_x) = conv.padding_mode, conv.stride, conv.dilation
    if plan.kind == "tucker":
        rank_in, rank_out = plan.ranks
        core = (rank_in, rank_out, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        parts: list[nn.Module] = []
        if rank_in < inputs:
            parts.append(_empty(nn.Conv2d, inputs, rank_in, 1, bias=False))
        parts.append(_empty(nn.Conv2d, *core, bias=bias and rank_out == outputs, padding_mode=mode))
        if rank_out < outputs:
            parts.append(_empty(nn.Conv2d, rank_out, outputs, 1, bias=bias))
        return parts
    (rank,) = plan.ranks
    if plan.kind == "svd":
        first = _empty(nn.Conv2d, inputs, rank, 1, conv.stride, conv.padding, bias=False, padding_mode=mode)
        return [first, _empty(nn.Conv2d, rank, outputs, 1, bias=bias)]
    tall, wide = conv.kernel_size
    above: str | tuple[int, int]
    beside: str | tuple[int, int]
    if isinstance(conv.padding, str):
        above = beside = conv.padding
    else:
        above, beside = (conv.padding[0], 0), (0, conv.padding[1])
    vertical = (inputs, rank, (tall, 1), (stride_y, 1), above, (step_y, 1))
    horizontal = (rank, outputs, (1, wide), (1, stride_x), beside, (1, step_x))
    return [
        _empty(nn.Conv2d, *vertical, bias=False, padding_mode=mode),
        _empty(nn.Conv2d, *horizontal, bias=bias, padding_mode=mode),
    ]


def _empty(kind: type[nn.Module], *arguments: Any, **settings: Any) -> nn.Module:
    """A layer whose weights are not set, so that no random numbers are drawn."""
    made: nn.Module = skip_init(kind, *arguments, **settings)  # type: ignore[no-untyped-call]
    return made


def factorised(layer: nn.Conv2d | nn.Linear, plan: Factored) -> Factors:
    """The closest factors of a layer that a truncated decomposition gives, computed in float64.

    `svd` and `split` (Jaderberg et al. 2014, arXiv 1405.3866, scheme 2) are the best approximation of the
    weight of that rank; `tucker` is the truncated HOSVD (Kim et al. 2016, arXiv 1511.06530), within a
    factor of sqrt(2) of the best.
    """
    factors = shaped(layer, plan)
    weight = layer.weight.detach().double()
    weights: list[Tensor]
    if plan.kind == "svd":
        left, right = _low_rank(weight.flatten(1), plan.ranks[0])
        weights = [right, left]
    elif plan.kind == "split":
        left, right = _low_rank(_split_matrix(weight), plan.ranks[0])
        outputs, _, _, wide = weight.shape
        weights = [right, left.view(outputs, wide, -1).transpose(1, 2)]
    else:
        into, out, core = _tucker(weight, *plan.ranks)
        weights = [into.T] if plan.ranks[0] < weight.shape[1] else []
        weights += [core]
        weights += [out] if plan.ranks[1] < weight.shape[0] else []
    for module, values in zip(factors, weights, strict=True):
        made = module.weight
        assert isinstance(made, nn.Parameter)
        made.data.copy_(values.reshape(made.shape))
    return factors


def errors(weight: Tensor, ranks: Mapping[Kind, tuple[int, ...]]) -> dict[Kind, float]:
    """Squared error that each decomposition of a k x k weight `(O, I, kh, kw)` leaves."""
    weight = weight.detach().double()
    total, found = float(weight.square().sum()), dict[Kind, float]()
    for kind, wanted in ranks.items():
        if kind == "tucker":
            kept = float(_tucker(weight, *wanted)[2].square().sum())
        else:
            matrix = _split_matrix(weight) if kind == "split" else weight.flatten(1)
            kept = float(torch.linalg.eigvalsh(_gram(matrix))[-wanted[0] :].sum())
        found[kind] = total - kept
    return found


def _gram(matrix: Tensor) -> Tensor:
    """The smaller of the two products of a matrix with itself: the squared singular values are in it."""
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The `rank` leading left singular vectors `(rows, rank)` of a matrix."""
    vectors: Tensor = torch.linalg.eigh(matrix @ matrix.T).eigenvectors
    return vectors[:, -rank:].flip(1)


def _low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`(rows, rank)` and `(rank, columns)` whose product is closest, both of the same size.

    From the smaller Gram matrix, many times faster than a singular value decomposition of large layers.
    """
    if matrix.shape[0] > matrix.shape[1]:
        left, right = _low_rank(matrix.T, rank)
        return right.T, left.T
    basis = _leading(matrix, rank)
    projected = basis.T @ matrix
    scale = projected.norm(dim=1).clamp_min(1e-12).sqrt()
    return basis * scale, projected / scale[:, None]


def _split_matrix(weight: Tensor) -> Tensor:
    """`(O kw, I kh)`: rank r of it is r columns of k x 1 filters and r rows of 1 x k ones."""
    return weight.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)


def _tucker(weight: Tensor, rank_in: int, rank_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bases `(I, rank_in)` and `(O, rank_out)` and the core `(rank_out, rank_in, kh, kw)`.

    A side of full rank keeps its channels as they are.
    """
    outputs, inputs = weight.shape[:2]
    into, out = torch.eye(inputs).to(weight), torch.eye(outputs).to(weight)
    if rank_in < inputs:
        into = _leading(weight.transpose(0, 1).flatten(1), rank_in)
    if rank_out < outputs:
        out = _leading(weight.flatten(1), rank_out)
    return into, out, torch.einsum("oihw,ia,ob->bahw", weight, into, out)
