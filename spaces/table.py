"""A search space as arrays: shapes and multiplications of many recipes at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spaces.activations import SAVED
from spaces.methods.prune import kept_channels
from spaces.recipe import Activate, Prune, Quantize
from spaces.space import SearchSpace, Value

Options = NDArray[np.int64]
"""`(N, P)`: for each recipe the position of each parameter's value; 0 everywhere is the base."""


@dataclass(frozen=True)
class Shapes:
    """Layers of N recipes.

    Attributes:
        inputs, outputs: `(N, L)` channels left.
        macs: `(N, L)` multiply-accumulates.
        bits: `(N, L)` bit-widths.
        costly: `(N, L)` cost of the activation function behind the layer over that of a costly one, 0..1.
    """

    inputs: NDArray[np.float64]
    outputs: NDArray[np.float64]
    macs: NDArray[np.float64]
    bits: NDArray[np.int64]
    costly: NDArray[np.float64]


class SpaceTable:
    """Vectorised view of a space; parameters in the space's order, layers in order of execution."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.names = list(space.parameters)
        self.sizes = np.array([len(p.values) for p in space.parameters.values()])
        facts = list(space.sites.facts.values())
        self.layers = [layer.name for layer in facts]
        self.positions = np.array([layer.positions for layer in facts], float)
        self.depthwise = np.array([layer.depthwise for layer in facts])
        self._kernel = np.array([layer.kernel[0] * layer.kernel[1] for layer in facts], float)
        self._groups = np.array([1 if layer.depthwise else layer.groups for layer in facts], float)
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
        self._bits = np.full((len(self.names), most, layers), 32)
        self._saved = np.zeros((len(self.names), most, layers))
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
                                width = max(choice.weight_bits, choice.activation_bits)
                                self._bits[p, o, place[layer]] = width
                        case Activate():
                            followed = [place[layer] for layer in sites.activation[choice.site].layers]
                            self._saved[p, o, followed] = SAVED.get(choice.function, 0.0)
                        case _:
                            pass
        self._sets_bits = (self._bits != 32).any(axis=1)
        self.activates = bool(self._saved.any())
        """True where the space may replace activation functions."""

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
        count = len(options)
        lost_in = np.zeros((count, len(self.layers)))
        lost_out = np.zeros_like(lost_in)
        bits = np.full((count, len(self.layers)), 32)
        saved = np.zeros((count, len(self.layers)))
        for p in range(len(self.names)):
            chosen = options[:, p]
            lost_in += self._lost_in[p, chosen]
            lost_out += self._lost_out[p, chosen]
            bits = np.minimum(bits, self._bits[p, chosen])
            saved += self._saved[p, chosen]
        return self._shapes(lost_in, lost_out, bits, saved)

    def neighbours(
        self, current: NDArray[np.int64], parameter: NDArray[np.int64], option: NDArray[np.int64]
    ) -> Shapes:
        """Layers of M recipes that each differ from `current` `(P,)` in one parameter: `shapes`, faster.

        Args:
            current: positions of a recipe.
            parameter, option: `(M,)`, what the m-th recipe changes, and to which position.
        """
        rows = np.arange(len(self.names))
        before = current[parameter]
        lost_in = self._lost_in[rows, current].sum(0) + (
            self._lost_in[parameter, option] - self._lost_in[parameter, before]
        )
        lost_out = self._lost_out[rows, current].sum(0) + (
            self._lost_out[parameter, option] - self._lost_out[parameter, before]
        )
        held = self._bits[rows, current].min(0)  # a layer takes its bit-width from one parameter alone
        bits = np.where(self._sets_bits[parameter], self._bits[parameter, option], held)
        saved = self._saved[rows, current].sum(0) + (
            self._saved[parameter, option] - self._saved[parameter, before]
        )
        return self._shapes(lost_in, lost_out, bits, saved)

    def _shapes(
        self,
        lost_in: NDArray[np.float64],
        lost_out: NDArray[np.float64],
        bits: NDArray[np.int64],
        saved: NDArray[np.float64],
    ) -> Shapes:
        outputs = self._base_out - lost_out
        inputs = np.where(self.depthwise, outputs, self._base_in - lost_in)
        filters = np.where(self.depthwise, 1.0, inputs / self._groups)
        macs = outputs * filters * self._kernel * self.positions
        return Shapes(inputs, outputs, macs, bits, np.maximum(self._costly - saved, 0.0))
