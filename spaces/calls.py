"""What the modules of a network take and return, call by call, which tells what may be done to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def block_calls(
    network: nn.Module, size: tuple[int, int], names: set[str]
) -> dict[str, list[tuple[Any, Any]]]:
    """What each module takes (one tensor, or nothing that counts) and returns on a noisy image."""
    calls: dict[str, list[tuple[Any, Any]]] = {name: [] for name in sorted(names)}
    taken: dict[str, Any] = {}

    def before(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            alone = len(inputs) == 1 and not keywords and isinstance(inputs[0], Tensor)
            taken[name] = inputs[0].clone() if alone else None  # blocks may write into their input

        return hook

    def after(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            calls[name].append((taken[name], output.clone() if isinstance(output, Tensor) else None))

        return hook

    handles = []
    for name in calls:
        module = network.get_submodule(name)
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network(images)
    for handle in handles:
        handle.remove()
    return calls


def shares_weights(network: nn.Module, name: str) -> bool:
    """True where a block's weights are also those of a module outside it."""
    inside = {id(p) for p in network.get_submodule(name).parameters()}
    outside = (p for n, p in network.named_parameters(remove_duplicate=False) if not n.startswith(f"{name}."))
    return any(id(p) in inside for p in outside)
