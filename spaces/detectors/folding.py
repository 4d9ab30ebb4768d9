"""BatchNorm folded into the layer in front of it, for `Detector.simplified` of any family."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

from spaces.gates import ConstantGate
from spaces.lowrank import Factors, by_part

T = TypeVar("T")
FOLDABLE = (nn.BatchNorm2d, FrozenBatchNorm2d)
"""Norms that `fold` takes; subclasses may compute an activation as well, and stay as they are."""


def folded(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode with BatchNorm folded by `fold_norms`, and constant gates by `fold_gates`."""
    network = copy.deepcopy(network).eval()
    fold_norms(network)
    fold_gates(network)
    return network


def fold_gates(network: nn.Module) -> None:
    """Take every constant gate into the convolution that a sequence runs behind it, in place."""
    for module in list(network.modules()):
        if type(module).forward is not nn.Sequential.forward:  # one of its own may run them in another order
            continue
        for (name, gate), (_, follower) in itertools.pairwise(list(module.named_children())):
            reader = _first(follower)
            if isinstance(gate, ConstantGate) and reader is not None and reader.groups == 1:
                reader.weight.data *= gate.gates.data[:, None, None]
                module.register_module(name, nn.Identity())


def _first(module: nn.Module) -> nn.Conv2d | None:
    """The convolution that a module begins with, if it does."""
    while type(module).forward is nn.Sequential.forward and isinstance(module, nn.Sequential) and len(module):
        module = module[0]
    return module if type(module) is nn.Conv2d else None


def fold_norms(network: nn.Module) -> None:
    """Fold every BatchNorm that a module holds right behind a convolution, in place; an identity stays there.

    For modules that register a convolution and its norm one after the other and run them so, as those of
    torchvision, YOLOX and Ultralytics do: where something is computed in between, the result is another
    network, which the evaluation of a study's base finds out. Subclasses of `nn.Conv2d` and of the norms may
    compute something else; they stay. `network` is in evaluation mode.
    """
    for module in list(network.modules()):
        if isinstance(module, Factors):
            continue
        for (name, layer), (norm_name, norm) in itertools.pairwise(list(module.named_children())):
            if type(norm) in FOLDABLE and _produced(layer) == _channels(norm) > 0:
                module.register_module(name, fold(layer, norm))
                module.register_module(norm_name, nn.Identity())


def by_module(network: nn.Module, simplified: nn.Module, layers: Mapping[str, T]) -> dict[str, T]:
    """What holds for layers, by all modules that `simplified` has in their place.

    Those are the factors of one, as in `by_part`, and copies: a layer that levels share has a name in each of
    them, and where each has a norm of its own, folding makes a layer of each name.
    """
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in network.named_modules(remove_duplicate=False):
        names[module].append(name)
    there = dict(simplified.named_modules(remove_duplicate=False))
    found: dict[str, T] = {}
    for layer, value in by_part(network, layers).items():
        found[layer] = value
        copies = {there.get(layer)}
        for name in names[network.get_submodule(layer)]:
            if name in there and there[name] not in copies:
                found[name] = value
                copies.add(there[name])
    return found


def _produced(layer: nn.Module) -> int:
    """Channels that a convolution puts out, 0 for anything else."""
    last = layer[-1] if isinstance(layer, Factors) else layer
    return last.out_channels if type(last) is nn.Conv2d else 0


def _channels(norm: nn.Module) -> int:
    """Channels of a norm; one of others than the layer registered before it runs behind another layer."""
    mean = norm.running_mean
    return len(mean) if isinstance(mean, Tensor) else 0


def fold(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """What `norm(layer(x))` computes in evaluation mode, as a layer; a factorised one takes it into its last.

    Raises:
        TypeError: no layer or norm that can be folded.
    """
    if isinstance(layer, Factors):
        return Factors(*layer[:-1], fold(layer[-1], norm)).eval()
    if not isinstance(layer, nn.Conv2d) or not _produced(layer) or type(norm) not in FOLDABLE:
        raise TypeError(f"{type(norm).__name__} cannot be folded into {type(layer).__name__}")
    if isinstance(norm, nn.BatchNorm2d):
        return fuse_conv_bn_eval(layer, norm)
    assert isinstance(norm, FrozenBatchNorm2d)
    whole = copy.deepcopy(layer)
    whole.weight, whole.bias = fuse_conv_bn_weights(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return whole
