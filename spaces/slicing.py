"""Layers cut down to some of their channels, by indices of the base graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from spaces.errors import InputError

if TYPE_CHECKING:  # finding sites needs slicing itself
    from spaces.sites import ChannelSite


@dataclass(frozen=True)
class LayerChannels:
    """Indices of the base layer's channels that are left; None where all are."""

    out: tuple[int, ...] | None = None
    into: tuple[int, ...] | None = None


def channels_left(
    network: nn.Module, sites: Mapping[str, ChannelSite], kept: Mapping[str, Tensor]
) -> dict[str, LayerChannels]:
    """Indices of every touched layer's channels that are left, from the sites' kept channels."""
    removed: dict[str, dict[str, set[int]]] = defaultdict(lambda: {"out": set(), "in": set()})
    for name, indices in kept.items():
        alive = set(indices.tolist())
        for member in sites[name].members:
            removed[member.layer][member.side].update(
                c for c, root in zip(member.channels, member.roots, strict=True) if root not in alive
            )
    left = {}
    for layer, gone in removed.items():
        inputs, outputs = widths_of(part_named(network, layer))
        left[layer] = LayerChannels(_without(outputs, gone["out"]), _without(inputs, gone["in"]))
    return left


def part_named(network: nn.Module, name: str) -> nn.Module | nn.Parameter:
    """A module, or a parameter that a module holds beside its layers, by its name."""
    parent, _, last = name.rpartition(".")
    part: nn.Module | nn.Parameter = getattr(network.get_submodule(parent), last)
    return part


def widths_of(module: nn.Module | nn.Parameter) -> tuple[int, int]:
    """Input and output channels; a norm has as many of either."""
    match module:
        case nn.Conv2d():
            return module.in_channels, module.out_channels
        case nn.Linear():
            return module.in_features, module.out_features
        case nn.BatchNorm2d():
            return module.num_features, module.num_features
        case nn.GroupNorm():
            return module.num_channels, module.num_channels
        case FrozenBatchNorm2d():
            return len(module.weight), len(module.weight)
        case nn.Parameter():
            return module.numel(), module.numel()
        case _:
            raise TypeError(f"cannot prune a {type(module).__name__}")


def _without(total: int, gone: set[int]) -> tuple[int, ...] | None:
    return tuple(c for c in range(total) if c not in gone) if gone else None


def slice_layers(network: nn.Module, channels: Mapping[str, LayerChannels]) -> None:
    """Cut layers down, in place, to the channels that are left.

    Works on the base network's shapes, whatever its weights, so a stored plan rebuilds a pruned network
    without the library that found the dependencies.
    """
    for name, left in channels.items():
        module = part_named(network, name)
        match module:
            case nn.Conv2d():
                _slice_conv(module, left)
            case nn.Linear():
                _slice_parameter(module, "weight", left.into, dim=1)
                _slice_parameter(module, "weight", left.out)
                _slice_parameter(module, "bias", left.out)
                module.out_features, module.in_features = module.weight.shape
            case nn.BatchNorm2d() | FrozenBatchNorm2d():
                for tensor in ("weight", "bias", "running_mean", "running_var"):
                    _slice_parameter(module, tensor, left.out)
                if left.out is not None and isinstance(module, nn.BatchNorm2d):
                    module.num_features = len(left.out)
            case nn.GroupNorm():
                _slice_parameter(module, "weight", left.out)
                _slice_parameter(module, "bias", left.out)
                if left.out is not None:
                    if module.num_groups > 1:  # sites take whole groups; those left stay what they were
                        module.num_groups = len(left.out) * module.num_groups // module.num_channels
                    module.num_channels = len(left.out)
            case nn.Parameter():
                parent, _, last = name.rpartition(".")
                dim = max(range(module.dim()), key=lambda d: module.shape[d])
                _slice_parameter(network.get_submodule(parent), last, left.out, dim)
            case _:
                raise InputError("channels", name, f"cannot slice a {type(module).__name__}")


def _slice_conv(conv: nn.Conv2d, left: LayerChannels) -> None:
    depthwise = conv.groups > 1
    _slice_parameter(conv, "weight", left.out)
    _slice_parameter(conv, "bias", left.out)
    if not depthwise:
        _slice_parameter(conv, "weight", left.into, dim=1)
    conv.out_channels = int(conv.weight.shape[0])
    if depthwise:
        conv.groups = conv.in_channels = conv.out_channels
    else:
        conv.in_channels = int(conv.weight.shape[1])


def _slice_parameter(module: nn.Module, name: str, left: tuple[int, ...] | None, dim: int = 0) -> None:
    tensor = getattr(module, name)
    if left is None or tensor is None:
        return
    cut = tensor.detach().index_select(dim, torch.tensor(left, device=tensor.device)).clone()
    if isinstance(tensor, nn.Parameter):
        setattr(module, name, nn.Parameter(cut, requires_grad=tensor.requires_grad))
    else:
        setattr(module, name, cut)
