"""Squeeze-and-excitation: blocks that multiply each channel by a gate, computed from the whole image."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spaces.blocks import Block, BlockSite, innermost

FEW = 4
"""Positions that a map must have for a gate to show: one number would be the same everywhere."""
TOLERANCE = 1e-4


class ConstantGate(nn.Module):
    """Multiplies each channel by a number, whatever the image.

    Args:
        gates: `(C,)`.
    """

    def __init__(self, gates: Tensor) -> None:
        super().__init__()
        self.gates = nn.Parameter(gates.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gates[:, None, None]


def gate_sites(blocks: list[Block]) -> dict[str, BlockSite]:
    """Gating ones of the blocks (Hu et al. 2018, arXiv 1709.01507), innermost ones only, as they run.

    A block gates where what it returns is what it takes times one number a channel, which its last layer puts
    out. That needs no knowledge of the family.
    """
    return innermost(blocks, lambda block: gates_of(block.read, block.written) is not None)


def gates_of(read: Tensor, written: Tensor) -> Tensor | None:
    """The gates `(N, C)` of a block that made `written` `(N, C, H, W)` of `read`; None where it has none.

    They are read where a channel is largest; a channel that is 0 everywhere has the gate 1.
    """
    if read.dim() != 4 or read.shape != written.shape or read.shape[2] * read.shape[3] < FEW:
        return None
    flat, out = read.flatten(2), written.flatten(2)
    places = flat.abs().argmax(dim=2, keepdim=True)
    largest = flat.gather(2, places)
    gates = torch.where(largest == 0, 1.0, out.gather(2, places) / torch.where(largest == 0, 1.0, largest))
    same = (flat * gates - out).abs().max() <= TOLERANCE * out.abs().max()
    return gates.squeeze(2) if bool(same) and bool(largest.any()) else None


def replace_gates(network: nn.Module, gates: Mapping[str, Tensor]) -> None:
    """Put a `ConstantGate` in the place of each block, by name."""
    for name, values in gates.items():
        network.set_submodule(name, ConstantGate(values))


def gates_at_rest(block: nn.Module, channels: int) -> Tensor:
    """The gates `(channels,)` of a gating block that sees next to nothing, where no data says better."""
    faint = torch.full((1, channels, FEW, FEW), 1e-3)
    with torch.no_grad():
        gates = gates_of(faint, copy.deepcopy(block).eval()(faint))
    return torch.ones(channels) if gates is None else gates[0]
