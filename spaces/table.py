"""A search space as arrays: shapes and multiplications of many recipes at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spaces.activations import SAVED
from spaces.methods.prune import kept_channels
from spaces.ranks import Geometry, Part
from spaces.recipe import (
    Activate,
    Drop,
    Factorize,
    Gate,
    Proposals,
    Prune,
    Quantize,
    Resize,
    TopK,
    is_identity,
)
from spaces.space import SearchSpace, Value

Options = NDArray[np.int64]
"""`(N, P)`: for each recipe the position of each parameter's value; 0 everywhere is the base."""


@dataclass(frozen=True)
class Shapes:
    """Layers of N recipes.

    Attributes:
        inputs, outputs: `(N, L)` channels left; none where the layer is dropped.
        macs: `(N, L)` multiply-accumulates, of all factors of a factorised layer.
        bits: `(N, L)` bit-widths.
        costly: `(N, L)` cost of the activation function behind the layer over that of a costly one, 0..1.
        polynomial: `(N, L)` 1 where a polynomial stands in the place of a costly activation function.
        rank_in, rank_out: `(N, L)` channels behind the first factor of a factorised layer and before its
            last one; 0 where it is whole.
        positions, read: `(N, L)` height x width of what the layer produces and reads, of all proposals.
        boxes: `(N, L)` share of the base's boxes that go into suppression, behind the last layer; else 0.
    """

    inputs: NDArray[np.float64]
    outputs: NDArray[np.float64]
    macs: NDArray[np.float64]
    bits: NDArray[np.int64]
    costly: NDArray[np.float64]
    polynomial: NDArray[np.float64]
    rank_in: NDArray[np.float64]
    rank_out: NDArray[np.float64]
    positions: NDArray[np.float64]
    read: NDArray[np.float64]
    boxes: NDArray[np.float64]


@dataclass(frozen=True)
class Held:
    """What one recipe takes from every layer; see `SpaceTable.held`.

    Attributes:
        options: `(P,)` of the recipe.
        summed: `(L,)` each: what adds up over parameters.
        bits: `(L,)`.
        size: position among the sizes of the input.
    """

    options: NDArray[np.int64]
    summed: tuple[NDArray[np.float64], ...]
    bits: NDArray[np.int64]
    size: int


class SpaceTable:
    """Vectorised view of a space; parameters in the space's order, layers in order of execution."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.names = list(space.parameters)
        self.sizes = np.array([len(p.values) for p in space.parameters.values()])
        facts = list(space.sites.facts.values())
        self.layers = [layer.name for layer in facts]
        self.depthwise = np.array([layer.depthwise for layer in facts])
        self.kernel = np.array([layer.kernel[0] * layer.kernel[1] for layer in facts], float)
        self._groups = np.array([1 if layer.depthwise else layer.groups for layer in facts], float)
        self._geometry = Geometry.of(facts)
        smaller = space.sites.input.smaller if space.sites.input else {}
        sizes = [self._geometry, *(Geometry.of(list(layers.values())) for layers in smaller.values())]
        self._positions = np.stack([geometry.positions for geometry in sizes])  # (S, L)
        self._read = np.stack([geometry.read for geometry in sizes])
        self._places = {size: place for place, size in enumerate(smaller, start=1)}
        self._base_in = np.array([layer.inputs for layer in facts], float)
        self._base_out = np.array([layer.outputs for layer in facts], float)
        self._widths_and_bits()
        self.base = self.shapes(np.zeros((1, len(self.names)), np.int64))

    def _widths_and_bits(self) -> None:
        """Per parameter and option: channels that every layer loses, and the bit-widths it sets."""
        sites, place = self.space.sites, {name: k for k, name in enumerate(self.layers)}
        most, layers = int(self.sizes.max(initial=1)), len(self.layers)
        self._lost_in = np.zeros((len(self.names), most, layers))
        self._lost_out = np.zeros_like(self._lost_in)
        self._low_rank = np.zeros_like(self._lost_in)  # 1 - rank / full rank
        self._multiple = 1
        self._bits = np.full((len(self.names), most, layers), 32)
        self._saved = np.zeros((len(self.names), most, layers))
        self._polynomial = np.zeros((len(self.names), most, layers))
        self._dropped = np.zeros((len(self.names), most, layers))
        self._size = np.zeros((len(self.names), most), np.int64)
        self._fewer = np.zeros((len(self.names), most, layers))  # 1 - share of the proposals
        self._passed_over = np.zeros((len(self.names), most, layers))  # 1 - share of the boxes
        self._last = (np.arange(layers) == layers - 1).astype(float)
        self._costly = np.zeros(layers)
        for stage in sites.activation.values():
            self._costly[[place[layer] for layer in stage.layers]] = 1.0
        for p, parameter in enumerate(self.space.parameters.values()):
            for o, choices in enumerate(parameter.choices):
                for choice in choices:
                    match choice:
                        case Prune():
                            site = sites.channel[choice.site]
                            gone = site.channels - kept_channels(site.channels, choice.sparsity)
                            for member in site.members:
                                if member.layer in place:
                                    lost = self._lost_in if member.side == "in" else self._lost_out
                                    share = len(member.channels) // site.channels
                                    lost[p, o, place[member.layer]] += gone * share
                        case Quantize():
                            for layer in sites.layer[choice.site].layers:
                                width = self.space.capabilities.runs_at(
                                    max(choice.weight_bits, choice.activation_bits)
                                )
                                self._bits[p, o, place[layer]] = width
                        case Activate():
                            followed = [place[layer] for layer in sites.activation[choice.site].layers]
                            self._saved[p, o, followed] = SAVED.get(choice.function, 0.0)
                            self._polynomial[p, o, followed] = choice.function == "polynomial"
                        case Factorize():
                            thinner = [place[layer] for layer in sites.layer[choice.site].layers]
                            self._low_rank[p, o, thinner] = 1 - choice.rank_ratio
                            self._multiple = choice.multiple
                        case Drop():
                            inside = [place[layer] for layer in sites.residual[choice.site].layers]
                            self._dropped[p, o, inside] = float(choice.dropped)
                        case Gate():
                            inside = [place[layer] for layer in sites.gate[choice.site].layers]
                            self._dropped[p, o, inside] = float(choice.constant)
                        case Resize() if not is_identity(choice):
                            self._size[p, o] = self._places[choice.size]
                        case Proposals():
                            seen = sites.proposals[choice.site]
                            on_them = [place[layer] for layer in seen.layers]
                            self._fewer[p, o, on_them] = 1 - seen.kept(choice.share) / seen.count
                        case TopK() if not is_identity(choice) and sites.suppression is not None:
                            self._passed_over[p, o, -1] = 1 - choice.count / sites.suppression.limit
        self._sets_bits = (self._bits != 32).any(axis=1)
        # What adds up over parameters; a layer's rank is chosen by one parameter alone.
        self._summed = [self._lost_in, self._lost_out, self._low_rank, self._saved, self._dropped]
        self.approximates = bool(self._polynomial.any())
        """True where the space may put a polynomial in the place of activation functions."""
        self._summed += [self._polynomial] * self.approximates
        self.proposes = bool(self._fewer.any())
        """True where the space may lower the number of proposals."""
        self.shortens = bool(self._passed_over.any())
        """True where the space may lower the number of boxes that go into suppression."""
        self._summed += [self._fewer] * self.proposes + [self._passed_over] * self.shortens
        self.crops = np.zeros(layers)
        for seen in sites.proposals.values():
            self.crops[place[seen.layers[0]]] = 1.0
        """1 for the layers that read what was cut out of the pyramid for every proposal."""
        self.activates = bool(self._saved.any())
        """True where the space may replace activation functions."""
        self.factorizes = bool(self._low_rank.any())
        """True where the space may factorise layers."""
        self.resizes = bool(self._size.any())
        """True where the space may make the input smaller."""

    def options(self, params: Sequence[Mapping[str, Any]]) -> Options:
        """Positions `(N, P)` of the values of N sets of parameters."""
        rows = [
            [parameter.option(one[name]) for name, parameter in self.space.parameters.items()]
            for one in params
        ]
        return np.array(rows, dtype=np.int64).reshape(len(params), len(self.names))

    def params(self, options: NDArray[np.int64]) -> dict[str, Value]:
        """The parameters of one row `(P,)` of positions."""
        parameters = self.space.parameters.items()
        return {name: p.values[int(o)] for (name, p), o in zip(parameters, options, strict=True)}

    def shapes(self, options: Options) -> Shapes:
        """Layers of N recipes."""
        bits = np.full((len(options), len(self.layers)), 32)
        summed = [np.zeros(bits.shape) for _ in self._summed]
        size = self._size[np.arange(len(self.names)), options].sum(axis=1)
        for p in range(len(self.names)):
            chosen = options[:, p]
            bits = np.minimum(bits, self._bits[p, chosen])
            for total, values in zip(summed, self._summed, strict=True):
                total += values[p, chosen]
        return self._shapes(summed, bits, size)

    def held(self, current: NDArray[np.int64]) -> Held:
        """What a recipe `(P,)` takes from every layer."""
        rows = np.arange(len(self.names)) * self._bits.shape[1] + current
        taken = (v.reshape(-1, len(self.layers)).take(rows, axis=0) for v in self._summed)
        # A layer takes its bit-width from one parameter alone.
        bits = self._bits.reshape(-1, len(self.layers)).take(rows, axis=0).min(0)
        size = int(self._size.reshape(-1).take(rows).sum())
        return Held(current, tuple(values.sum(0) for values in taken), bits, size)

    def neighbours(
        self,
        current: NDArray[np.int64] | Held,
        parameter: NDArray[np.int64],
        option: NDArray[np.int64],
        layers: NDArray[np.int64] | None = None,
    ) -> Shapes:
        """Layers of M recipes that each differ from `current` in one parameter: `shapes`, faster.

        Args:
            current: positions `(P,)` of a recipe, or what `held` says of them.
            parameter, option: `(M,)`, what the m-th recipe changes, and to which position.
            layers: `(M,)`, of the m-th recipe only this layer; the result's arrays are then `(M,)`.
        """
        held = current if isinstance(current, Held) else self.held(current)
        at: tuple[NDArray[np.int64], ...] = () if layers is None else (layers,)
        new, old = (parameter, option, *at), (parameter, held.options[parameter], *at)
        summed = [
            total[at or ...] + values[new] - values[old]
            for total, values in zip(held.summed, self._summed, strict=True)
        ]
        bits = self.bits_after(held, parameter, option, layers)
        size = held.size + self._size[parameter, option] - self._size[parameter, held.options[parameter]]
        return self._shapes(summed, bits, size, layers)

    def bits_after(
        self,
        held: Held,
        parameter: NDArray[np.int64],
        option: NDArray[np.int64],
        layers: NDArray[np.int64] | None = None,
    ) -> NDArray[np.int64]:
        """Bit-widths alone of `neighbours`."""
        at: tuple[NDArray[np.int64], ...] = () if layers is None else (layers,)
        own = self._bits[(parameter, option, *at)]
        bits: NDArray[np.int64] = np.where(self._sets_bits[(parameter, *at)], own, held.bits[at or ...])
        return bits

    def _shapes(
        self,
        summed: Sequence[NDArray[np.float64]],
        bits: NDArray[np.int64],
        size: NDArray[np.int64],
        layers: NDArray[np.int64] | None = None,
    ) -> Shapes:
        at = slice(None) if layers is None else layers
        positions, read = (
            (v[size] if layers is None else v[size, layers]) for v in (self._positions, self._read)
        )
        lost_in, lost_out, low_rank, saved, dropped, *rest = summed
        polynomial = np.zeros(saved.shape)
        if self.approximates:
            polynomial, *rest = rest
        if self.proposes:
            fewer, *rest = rest
            positions, read = positions * (1 - fewer), read * (1 - fewer)
        boxes = np.broadcast_to(self._last[at], positions.shape)
        if self.shortens:
            boxes = boxes * (1 - rest[0])
        left = dropped < 0.5
        outputs = (self._base_out[at] - lost_out) * left
        inputs = np.where(self.depthwise[at], outputs, (self._base_in[at] - lost_in) * left)
        filters = np.where(self.depthwise[at], 1.0, inputs / self._groups[at])
        macs = outputs * filters * self.kernel[at] * positions
        rank_in = rank_out = np.zeros(macs.shape)
        if self.factorizes:
            geometry = self._geometry_of(positions, read, at)
            rank_in, rank_out = geometry.ranks(inputs, outputs, 1 - low_rank, self._multiple)
            factors = sum(part.macs for part in geometry.parts(inputs, outputs, rank_in, rank_out))
            macs = np.where(rank_in > 0, factors, macs)
        costly = np.maximum(self._costly[at] - saved, 0.0)
        return Shapes(
            inputs, outputs, macs, bits, costly, polynomial, rank_in, rank_out, positions, read, boxes
        )

    def thin_parts(self, shapes: Shapes, layers: NDArray[np.int64] | slice) -> tuple[Part, ...]:
        """What factorised layers compute before their last factor; nothing where the space has none.

        Args:
            shapes: of the layers.
            layers: which ones they are, along the last axis of the shapes.
        """
        if not self.factorizes:
            return ()
        geometry = self._geometry_of(shapes.positions, shapes.read, layers)
        first, core, _ = geometry.parts(shapes.inputs, shapes.outputs, shapes.rank_in, shapes.rank_out)
        return first, core

    def _geometry_of(
        self, positions: NDArray[np.float64], read: NDArray[np.float64], layers: NDArray[np.int64] | slice
    ) -> Geometry:
        geometry = self._geometry if isinstance(layers, slice) else self._geometry.at(layers)
        return replace(geometry, positions=positions, read=read)
