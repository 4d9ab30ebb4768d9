"""What a network passes on: the tensors that layers share, and the norms that belong to layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from spaces.detectors.folding import FOLDABLE

Key = tuple[int, int]
"""A tensor, and how often it was changed in place: an activation may write over what it reads."""


def _key(tensor: Tensor) -> Key:
    return id(tensor), tensor._version


def tensors_of(
    network: nn.Module, layers: Mapping[str, object], image: Tensor
) -> tuple[dict[str, tuple[Key, ...]], dict[str, tuple[Key, ...]]]:
    """The tensors that layers read, and those that they write; a layer may run several times."""
    read: dict[str, tuple[Key, ...]] = dict.fromkeys(layers, ())
    written: dict[str, tuple[Key, ...]] = dict.fromkeys(layers, ())
    alive = []  # an identity is only one as long as its tensor lives

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            alive.append((inputs[0], output))
            read[name] += (_key(inputs[0]),)
            written[name] += (_key(output),)

        return hook

    handles = [network.get_submodule(name).register_forward_hook(note(name)) for name in layers]
    with torch.no_grad():
        network(image)
    for handle in handles:
        handle.remove()
    return read, written


def norms_behind(
    network: nn.Module, simplified: nn.Module, layers: Mapping[str, object], image: Tensor
) -> dict[str, tuple[nn.Module | None, ...]]:
    """The norms that `simplified` folds into layers, by the layer's name; layers without any are left out.

    A layer that levels share may have one for each, or none in some, which is None. A norm belongs to the
    layer whose output it reads, and is folded where `simplified` has another module, or none, in its place.
    """
    there = dict(simplified.named_modules())
    folded = {
        norm: name
        for name, norm in network.named_modules()
        if isinstance(norm, FOLDABLE) and not isinstance(there.get(name), FOLDABLE)
    }
    readers: dict[Key, list[nn.Module]] = defaultdict(list)
    alive = []

    def note(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        alive.append(inputs[0])
        readers[_key(inputs[0])].append(norm)

    handles = [norm.register_forward_pre_hook(note) for norm in folded]
    training = [module for module in network.modules() if module.training]
    network.eval()
    _, written = tensors_of(network, layers, image)
    for module in training:
        module.training = True
    for handle in handles:
        handle.remove()
    found = {
        name: tuple(dict.fromkeys(readers[key][0] if key in readers else None for key in keys))
        for name, keys in written.items()
    }
    return {name: norms for name, norms in found.items() if norms not in ((), (None,))}
