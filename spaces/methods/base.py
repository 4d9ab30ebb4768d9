"""The Method protocol: one compression method, one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from spaces.capabilities import Capabilities
from spaces.lowrank import Factored
from spaces.recipe import Choice
from spaces.sites import Sites
from spaces.slicing import LayerChannels

Statistics = Mapping[str, Tensor]
"""Importance of a layer's output channels, `(outputs,)`, by layer name, and mean gates `(channels,)` of
squeeze-and-excitation blocks by theirs; made by `evaluators` from data."""


@dataclass
class Draft:
    """A network on its way through the methods: theirs to change, a copy of the base's.

    Attributes:
        network: the module, with the base's layer names.
        channels: what is left of each layer that lost channels.
        bits: (weight, activation) bit-widths of the layers that are not float32.
        activations: functions put in the place of others, by the name of the activation module.
        dropped: residual blocks that are left out, by module name.
        factors: how layers were factorised.
        codebooks: numbers of values that weights are stored in, by layer.
        size: height and width of the input in pixels where it is not the study's.
        proposals: regions that second stages look at, by module.
        topk: boxes that go into suppression where their number is not the study's.
        gates: channels of the blocks whose gates are constant, by module name.
        learned: what training learned of how layers are rounded, by module name, as plain data;
            `evaluators.calibration.LayerRanges` says what it means.
    """

    network: nn.Module
    channels: dict[str, LayerChannels] = field(default_factory=dict)
    bits: dict[str, tuple[int, int]] = field(default_factory=dict)
    activations: dict[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    factors: dict[str, Factored] = field(default_factory=dict)
    codebooks: dict[str, int] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    proposals: dict[str, int] = field(default_factory=dict)
    topk: int | None = None
    gates: dict[str, int] = field(default_factory=dict)
    learned: dict[str, Any] = field(default_factory=dict)

    @property
    def changed_modules(self) -> frozenset[str]:
        """Names of the modules that are not the base's own any more."""
        return frozenset([*self.channels, *self.factors, *self.activations, *self.dropped, *self.gates])

    @property
    def changed(self) -> bool:
        """True where the network has to be trained; bit-widths and fewer proposals leave its weights good."""
        return bool(self.changed_modules or self.size)


@runtime_checkable
class Method(Protocol):
    """What may be chosen at the sites of a detector, and how the choices are carried out."""

    kind: str

    def options(self, sites: Sites, capabilities: Capabilities) -> dict[str, tuple[Choice, ...]]:
        """Choices by site, mildest first: the first one changes nothing."""
        ...

    def check(self, choice: Choice, sites: Sites) -> None:
        """Refuse a choice that cannot be carried out.

        Raises:
            InputError: unknown site or illegal value, naming both.
        """
        ...

    def apply(self, draft: Draft, choices: Sequence[Choice], sites: Sites, statistics: Statistics) -> None:
        """Carry out all choices of this kind."""
        ...
