"""Residual blocks: modules that add something to their input, and can go without anything else changing."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from spaces.blocks import Block, BlockSite, innermost


def residual_sites(blocks: list[Block]) -> dict[str, BlockSite]:
    """Residual ones of the blocks by module name, innermost ones only, in order of execution.

    A block is residual where it gives back its input once all its weights are 0: `x + f(x)` does, and so does
    `relu(x + f(x))` of what is not negative. That needs no knowledge of the family.
    """
    return innermost(blocks, _gives_back)


def _gives_back(block: Block) -> bool:
    """True where a block without weights is the identity on what it reads."""
    silent = copy.deepcopy(block.module)
    state: list[Tensor] = list(silent.parameters())
    # Frozen norms hold scale and shift as buffers.
    state += [b for n, b in silent.named_buffers() if n.rpartition(".")[2] in ("weight", "bias")]
    with torch.no_grad():
        for tensor in state:
            tensor.zero_()
        return bool(block.read.any()) and bool(torch.equal(silent(block.read.clone()), block.read))
