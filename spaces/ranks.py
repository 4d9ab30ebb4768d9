"""Ranks of factorised layers and what they cost: one arithmetic for single layers and for whole tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spaces.layers import LayerFacts

MOST = 0.8
"""Share of a layer's multiplications that its factors may take: more layers move more data."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """One factor of each of many layers; no outputs and no multiplications where a layer has none.

    Attributes:
        outputs: channels that it produces.
        macs: multiply-accumulates.
        positions: height x width of what it produces.
    """

    outputs: Numbers
    macs: Numbers
    positions: Numbers


@dataclass(frozen=True)
class Geometry:
    """What factors cost beside the numbers of channels, `(L,)` each.

    Attributes:
        kernel: height x width of the kernel; 1 means two factors (SVD), more means three (Tucker-2).
        positions: output height x width.
        read: input height x width.
        dense: True where a layer has one group and another module may take its place.
    """

    kernel: Numbers
    positions: Numbers
    read: Numbers
    dense: NDArray[np.bool_]

    @staticmethod
    def of(facts: Sequence[LayerFacts]) -> Geometry:
        """That of layers in the order given."""
        return Geometry(
            np.array([math.prod(layer.kernel) for layer in facts], float),
            np.array([layer.positions for layer in facts], float),
            np.array([math.prod(layer.read) for layer in facts], float),
            np.array([layer.groups == 1 and layer.replaceable for layer in facts], bool),
        )

    def at(self, layers: NDArray[np.int64]) -> Geometry:
        """That of some of the layers."""
        return Geometry(self.kernel[layers], self.positions[layers], self.read[layers], self.dense[layers])

    def ranks(
        self, inputs: Numbers, outputs: Numbers, ratio: Numbers, multiple: int
    ) -> tuple[Numbers, Numbers]:
        """Channels behind the first factor and before the last one; 0 where the layer stays whole.

        A rank is the ratio of the full rank of that side, rounded to a multiple. A layer stays whole where
        the ratio is 1, where it has groups or fewer channels than two multiples, and where its factors
        would take more than `MOST` of its multiplications.

        Args:
            inputs, outputs: channels of the layers (after pruning).
            ratio: rank / full rank.
            multiple: of which ranks are.
        """
        spatial = self.kernel > 1
        full_in = np.minimum(inputs, outputs * self.kernel)
        full_out = np.minimum(outputs, inputs * self.kernel)
        rank_in, rank_out = (
            np.minimum(np.maximum(np.floor(ratio * full / multiple + 0.5), 1) * multiple, full)
            for full in (full_in, full_out)
        )
        rank_out = np.where(spatial, rank_out, rank_in)
        plain = inputs * outputs * self.kernel * self.positions
        factored = sum(part.macs for part in self.parts(inputs, outputs, rank_in, rank_out))
        pays = self.dense & (ratio < 1) & (np.minimum(inputs, outputs) >= 2 * multiple)
        pays = pays & (factored <= MOST * plain)
        return np.where(pays, rank_in, 0.0), np.where(pays, rank_out, 0.0)

    def parts(
        self, inputs: Numbers, outputs: Numbers, rank_in: Numbers, rank_out: Numbers
    ) -> tuple[Part, Part, Part]:
        """The factors of layers of these ranks: the first, the core of a spatial one, the last.

        A side of full rank has no factor of its own: there the core takes its place.
        """
        spatial = self.kernel > 1
        first = (rank_in > 0) & (~spatial | (rank_in < inputs))
        last = (rank_out > 0) & (~spatial | (rank_out < outputs))
        core_macs = np.where(spatial, rank_in * rank_out * self.kernel * self.positions, 0.0)
        reads = np.where(spatial, self.read, self.positions)
        return (
            Part(np.where(first, rank_in, 0.0), np.where(first, inputs * rank_in * reads, 0.0), reads),
            Part(np.where(last & spatial, rank_out, 0.0), np.where(last, core_macs, 0.0), self.positions),
            Part(
                outputs,
                np.where(last, rank_out * outputs * self.positions, core_macs),
                self.positions,
            ),
        )


def layer_ranks(
    facts: LayerFacts, inputs: int, outputs: int, ratio: float, multiple: int
) -> tuple[int, int, int] | None:
    """`Geometry.ranks` of one layer, and the multiplications that are left; None where it stays whole."""
    geometry = Geometry.of([facts])
    widths = np.array([float(inputs)]), np.array([float(outputs)])
    ranks = geometry.ranks(*widths, np.array([ratio]), multiple)
    if not ranks[0]:
        return None
    macs = sum(float(part.macs[0]) for part in geometry.parts(*widths, *ranks))
    return int(ranks[0][0]), int(ranks[1][0]), int(macs)
