"""Where a network spends time on costly activation functions, stage by stage."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spaces.detectors.base import Detector
from spaces.layers import LayerFacts

COSTLY: Mapping[type[nn.Module], str] = {
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.GELU: "gelu",
    nn.Mish: "mish",
}
"""Functions that take an engine several instructions an element, where ReLU takes one."""
SAVED: Mapping[str, float] = {"polynomial": 1.0, "hardswish": 0.93, "relu": 1.0}
"""Share of a costly function's time that another one in its place saves, for the latency model.

Measured on YOLOX-nano's tensor part at 320 px in OpenVINO 2026.4 (f32, AVX2, 1 thread): 0.72 of the time
with hard-swish in all stages, 0.70 with ReLU. What a polynomial takes instead depends on the engine (in some
it is one operation, in others nine) and is fitted.
"""


class PolynomialSiLU(nn.Module):
    """SiLU without an exponential: `x` times a polynomial of degree 7 in the place of the sigmoid.

    `x (1/2 + c P(c^2))` with c = x clipped to +-`REACH`, where the factor is 0 or 1. The coefficients
    are the least squares for x of a standard deviation of 2, with a thousandth of the weight on one of 6, and
    the reach is the best for that: 0.006 root mean square, 0.04 at most (hard-swish: 0.071 and 0.142). What
    it saves: AVX-512 takes some 40 cycles for 16 sigmoids, in OpenVINO 2026.4 half of the time of a bfloat16
    YOLOX-nano.

    It is trained as SiLU, which is close enough and one operation in the place of nine.
    """

    REACH = 4.9
    COEFFICIENTS = (0.2388535, -0.013932502, 0.00053482541, -7.9912747e-06)
    """Of c, c^3, c^5 and c^7."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()  # `inplace` is what the others take; this one reads its input twice

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise, of any shape."""
        if self.training:
            return functional.silu(x)
        first, *higher = self.COEFFICIENTS
        clipped = x.clamp(-self.REACH, self.REACH)
        square = clipped * clipped
        factor: Tensor | float = 0.0
        for coefficient in reversed(higher):
            factor = (factor + coefficient) * square
        return x * (0.5 + clipped * (factor + first))


@dataclass(frozen=True)
class ActivationSite:
    """The costly activations of one stage.

    Attributes:
        name: of the stage.
        modules: names of the activation modules; one instance may be there under several names.
        layers: whose outputs go through them.
        function: what they compute, by `COSTLY`; joined by `+` where they differ.
    """

    name: str
    modules: tuple[str, ...]
    layers: tuple[str, ...]
    function: str


def activation_sites(
    detector: Detector, network: nn.Module, facts: Mapping[str, LayerFacts]
) -> dict[str, ActivationSite]:
    """Activation sites by stage, in order of execution.

    An activation belongs to the layer whose output it takes, through norms and the like; where a function
    call stands between, to the layer that ran last. Activations behind output layers stay what they are.
    """
    behind = _layers_behind(network, detector.preprocess.size, facts)
    fixed = detector.output_layers(network)
    modules: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for name, layers in behind.items():
        if fixed.isdisjoint(layers):
            modules[detector.stage_of(layers[0])][name] = layers
    sites = {}
    for stage, found in modules.items():
        kinds = sorted({COSTLY[type(network.get_submodule(name))] for name in found})
        followed = tuple(dict.fromkeys(layer for several in found.values() for layer in several))
        sites[stage] = ActivationSite(stage, tuple(found), followed, "+".join(kinds))
    return sites


def _layers_behind(
    network: nn.Module, size: tuple[int, int], facts: Mapping[str, LayerFacts]
) -> dict[str, list[str]]:
    """For each activation that runs, by name: the layers in front of it."""
    network = copy.deepcopy(network).eval()
    names = [n for n, m in network.named_modules(remove_duplicate=False) if type(m) in COSTLY]
    for name in names:  # families share one instance, whose calls would not tell where they come from
        network.set_submodule(name, copy.deepcopy(network.get_submodule(name)))
    found: dict[str, list[str]] = defaultdict(list)
    source: dict[int, str] = {}
    alive: list[Tensor] = []  # while a tensor lives no other one has its id
    last = ""

    def hook(name: str, costly: bool) -> Any:
        def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            nonlocal last
            read = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
            layer = name if name in facts else source.get(id(read), last)
            last = name if name in facts else last
            if costly and layer and layer not in found[name]:
                found[name].append(layer)
            if layer and isinstance(output, Tensor):
                source[id(output)] = layer
                alive.append(output)

        return after

    for name, module in network.named_modules(remove_duplicate=False):
        if not any(True for _ in module.children()):
            module.register_forward_hook(hook(name, name in names))
    with torch.no_grad():
        network(torch.zeros(1, 3, *size))
    return {name: layers for name, layers in found.items() if layers}
