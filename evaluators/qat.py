"""Quantisation-aware training: integer layers round while they are trained, with scales that are learned."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from evaluators.bench import Bench
from evaluators.bias import BIAS_IMAGES, correct_biases
from evaluators.calibration import LayerRanges, Range
from evaluators.export import export_whole
from evaluators.finetune import FineTunePlan
from evaluators.integers import weight_scales, written_apart
from evaluators.norms import recalibrate_norms
from evaluators.passing import norms_behind, tensors_of
from evaluators.postprocess import WholeDetector
from evaluators.signature import int8_weight_levels
from spaces.effects import integers_by_layer
from spaces.lowrank import by_part
from spaces.methods.base import Draft
from spaces.recipe import Recipe

BYTE = 256
"""Levels of what a layer writes."""


def rounds_in_training(plan: FineTunePlan, layers: Mapping[str, tuple[int, int]]) -> bool:
    """Whether integer layers, with their weight and activation bits, round while they are trained.

    `auto` says so where any has fewer than 8 bits. At 8 calibration and bias correction come close to
    float32, and training a network that is otherwise the base's would cost time for nothing.
    """
    if plan.epochs == 0 or not plan.quantization_aware:
        return False
    return any(min(bits) < 8 or plan.quantization_aware is True for bits in layers.values())


def fake_quantized(bench: Bench, draft: Draft, recipe: Recipe) -> FakeQuantized:
    """Make the integer layers of a recipe round, starting from what post-training quantisation finds.

    Args:
        bench: of the study.
        draft: the recipe carried out; its network is changed in place. Norms are measured anew first where
            more than bit-widths differs from the base.
        recipe: of that draft.
    """
    network, config = draft.network, bench.config
    if draft.changed:
        recalibrate_norms(network, bench.detector, bench.fit, config.finetune.batch_size)
    layers = by_part(network, integers_by_layer(recipe, bench.sites))
    simplified = bench.detector.simplified(network)
    ranges = as_exported(bench.ranges(network, layers), bench.whole(network))
    images = bench.batch(bench.fit, min(config.calibration_images, BIAS_IMAGES))
    fake = FakeQuantized(network, simplified, ranges, images[:1], bench.capabilities.writes_integers)
    if config.quantization.bias_correction:
        fake.correct_biases(simplified, images)
    return fake


def as_exported(ranges: Mapping[str, LayerRanges], whole: WholeDetector) -> dict[str, LayerRanges]:
    """Ranges without those of written channels that the file of a detector has no use for.

    What follows a layer there decides that, see `evaluators.integers.written_apart`.
    """
    if not any(spans.written_by_channel for spans in ranges.values()):
        return dict(ranges)
    apart = written_apart(export_whole(whole), ranges)
    return {
        layer: spans if layer in apart else replace(spans, written_by_channel=())
        for layer, spans in ranges.items()
    }


def as_plain(ranges: Mapping[str, LayerRanges]) -> dict[str, Any]:
    """What `Draft.learned` holds."""
    return {name: asdict(spans) for name, spans in ranges.items()}


class FakeQuantized:
    """A network whose integer layers compute on rounded weights and inputs, as its exported file will.

    Scales are learned with the weights (LSQ: Esser et al. 2020, arXiv 1902.08153), zero points and the
    numbers of levels stay as calibrated; gradients go straight through the rounding and stop where values
    are clipped. Weights are rounded as they are exported: after the norm behind them was folded in, which
    therefore has to keep its statistics while it is trained (`nn.BatchNorm2d.eval`). A layer that levels
    share, with a norm for each, is several layers in the file, with other weights each: it does not round.

    Args:
        network: changed in place until `removed`.
        simplified: `Detector.simplified` of it.
        ranges: of the layers that round, calibrated on `simplified`, or learned before.
        image: `(1, 3, H, W)`: run once to see which tensors layers share.
        writes_integers: the target rounds what layers write, too.
        weight_levels: that the CPU bears; by default `evaluators.signature.int8_weight_levels`.
    """

    def __init__(
        self,
        network: nn.Module,
        simplified: nn.Module,
        ranges: Mapping[str, LayerRanges],
        image: Tensor,
        writes_integers: bool = False,
        weight_levels: int | None = None,
    ) -> None:
        self._network, self._handles = network, list[Any]()
        norms = norms_behind(network, simplified, ranges, image)
        self._norms = {name: found[0] for name, found in norms.items() if found[0] is not None}
        ranges = {name: spans for name, spans in ranges.items() if len(norms.get(name, ())) < 2}
        limit = int8_weight_levels() if weight_levels is None else weight_levels
        self._ranges = {name: replace(r, largest=min(r.largest, limit)) for name, r in ranges.items()}
        self._weights: dict[str, LearnedGrid] = {}
        self._read: dict[str, LearnedGrid] = {}
        self._written: dict[str, LearnedGrid] = {}
        inputs, outputs = tensors_of(simplified, ranges, image)
        produced = {key for keys in outputs.values() for key in keys} if writes_integers else set()
        shared: dict[object, LearnedGrid] = {}
        for name, spans in self._ranges.items():
            self._weights[name] = LearnedGrid.of_weight(simplified.get_submodule(name), spans)
            # What was written in bytes is not rounded again, see `evaluators.integers.quantized`.
            if not (produced.issuperset(inputs[name]) and spans.levels == BYTE and not spans.by_channel):
                kind = (inputs[name], spans.levels, bool(spans.by_channel))
                read = spans.by_channel or (spans.read,)
                self._read[name] = shared.setdefault(kind, LearnedGrid.of(read, spans.levels))
            if writes_integers:
                self._written[name] = LearnedGrid.of(spans.written_by_channel or (spans.written,), BYTE)
        self._attach()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that round."""
        return tuple(self._ranges)

    def writer(self, layer: str) -> nn.Module:
        """The module that puts out what a layer writes in its file: the layer, or the norm behind it."""
        return self._norms.get(layer, self._network.get_submodule(layer))

    def correct_biases(self, simplified: nn.Module, images: Tensor) -> None:
        """Begin at the biases that `evaluators.bias.correct_biases` finds, where layers have one to move.

        Args:
            simplified: as given; changed in place.
            images: `(N, 3, H, W)`, preprocessed, from the fit role.
        """
        before = {name: _bias(simplified.get_submodule(name)) for name in self._ranges}
        correct_biases(simplified, self._ranges, images)
        for name, old in before.items():
            bias, new = self.writer(name).bias, _bias(simplified.get_submodule(name))
            if isinstance(bias, Tensor):
                bias.data += new - old

    def plain_copy(self) -> tuple[nn.Module, dict[str, LayerRanges]]:
        """An ordinary copy of the network as it is now, and what was learned so far; training may go on."""
        self._detach()  # a copied module shares its class with the first, where a parametrisation lives
        again = copy.deepcopy(self._network)
        self._attach()
        return again, self._learned()

    def removed(self) -> dict[str, LayerRanges]:
        """Make the network an ordinary one again, with the weights that were rounded; what was learned."""
        self._detach()
        return self._learned()

    def _attach(self) -> None:
        for name in self._ranges:
            layer, writer = self._network.get_submodule(name), self.writer(name)
            rounded = _RoundedWeight(self._weights[name], self._norms.get(name))
            parametrize.register_parametrization(layer, "weight", rounded)
            if name in self._read:  # a child, so that the optimiser finds it
                layer.add_module("read_grid", self._read[name])
                self._handles.append(layer.register_forward_pre_hook(_rounds_inputs(self._read[name])))
            if name in self._written:
                writer.add_module("written_grid", self._written[name])
                self._handles.append(writer.register_forward_hook(_rounds_outputs(self._written[name])))

    def _detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        for name in self._ranges:
            layer = self._network.get_submodule(name)
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            bias = layer.bias  # goes behind the weight again, as in a new network
            del layer.bias
            layer.register_parameter("bias", bias)  # type: ignore[arg-type]
            if name in self._read:
                del layer.read_grid
            if name in self._written:
                del self.writer(name).written_grid

    def _learned(self) -> dict[str, LayerRanges]:
        found = {}
        for name, spans in self._ranges.items():
            learned: dict[str, Any] = {"weight_scales": self._weights[name].scales()}
            for side, grids in (("read", self._read), ("written", self._written)):
                if name in grids:
                    channels = "by_channel" if side == "read" else "written_by_channel"
                    made = grids[name].ranges()
                    learned |= {channels: made} if getattr(spans, channels) else {side: made[0]}
            found[name] = replace(spans, **learned)
        return found


class LearnedGrid(nn.Module):
    """Rounds tensors to integer multiples of scales, one for all or one a channel, and back.

    The parameter is `factor`, the scale over its start as `exp(factor - 1)`: scales stay positive, and steps
    relative to a parameter's size move all of them alike, however small they are.

    Args:
        scales: to begin with.
        zeros: integers that stand for 0, as many.
        lowest, largest: integers, those that are used.
        axis: of the channels.
    """

    start: Tensor
    zero: Tensor

    def __init__(
        self, scales: Sequence[float], zeros: Sequence[int], lowest: int, largest: int, axis: int
    ) -> None:
        super().__init__()
        self.lowest, self.largest, self.axis = lowest, largest, axis
        self.register_buffer("start", torch.tensor(scales, dtype=torch.float32))
        self.register_buffer("zero", torch.tensor(zeros, dtype=torch.float32))
        self.factor = nn.Parameter(torch.ones(len(scales)))

    @staticmethod
    def of(spans: Sequence[Range], levels: int) -> LearnedGrid:
        """The grid on which a target reads activations `(N, C, ...)` of these ranges."""
        grids = [span.grid(levels) for span in spans]
        return LearnedGrid([scale for scale, _ in grids], [zero for _, zero in grids], 0, levels - 1, axis=1)

    @staticmethod
    def of_weight(layer: nn.Module, spans: LayerRanges) -> LearnedGrid:
        """The grid on which a layer's weight is stored, norms folded in."""
        weight, largest = layer.weight, spans.largest
        assert isinstance(weight, Tensor)
        scales = spans.weight_scales or weight_scales(weight.detach().numpy(), largest).tolist()
        return LearnedGrid(scales, [0] * len(scales), -largest, largest, axis=0)

    def forward(self, tensor: Tensor) -> Tensor:
        """The tensor on its grid."""
        scale, tensor = self.start * (self.factor - 1).exp(), tensor.float()
        # Esser et al., section 2.2: keeps the gradients of scales in proportion to those of weights.
        each = tensor.numel() / len(scale) / (1 if self.axis == 0 else len(tensor))
        share = 1 / math.sqrt(each * self.largest)
        ends = (self.lowest, self.largest, share)
        if len(scale) == 1:
            return torch._fake_quantize_learnable_per_tensor_affine(tensor, scale, self.zero, *ends)
        return torch._fake_quantize_learnable_per_channel_affine(tensor, scale, self.zero, self.axis, *ends)

    def scales(self) -> tuple[float, ...]:
        """As they are now."""
        return tuple((self.start * (self.factor.detach() - 1).exp()).tolist())

    def ranges(self) -> tuple[Range, ...]:
        """The ranges of which `Range.grid` makes these scales and zero points."""
        pairs = zip(self.scales(), self.zero.tolist(), strict=True)
        return tuple(Range(-zero * scale, (self.largest - zero) * scale) for scale, zero in pairs)


class _RoundedWeight(nn.Module):
    """A weight as it is once the norm behind its layer is folded in, rounded and folded out again."""

    def __init__(self, grid: LearnedGrid, norm: nn.Module | None) -> None:
        super().__init__()
        self.grid = grid
        self._norm = (norm,)  # not a child: the network has it already

    def forward(self, weight: Tensor) -> Tensor:
        (norm,) = self._norm
        if norm is None:
            return self.grid(weight)  # type: ignore[no-any-return]
        gain = _gain(norm).view(-1, *(1,) * (weight.dim() - 1))
        gain = torch.where(gain == 0, 1.0, gain)  # a dead channel stays one: the norm itself does that
        rounded: Tensor = self.grid(weight * gain)
        return rounded / gain


def _gain(norm: nn.Module) -> Tensor:
    """What a norm multiplies its channels by, `(C,)`."""
    variance, weight = norm.running_var, norm.weight
    assert isinstance(variance, Tensor)
    assert isinstance(norm.eps, float)
    gain = torch.rsqrt(variance + norm.eps)
    return gain * weight if isinstance(weight, Tensor) else gain


def _bias(layer: nn.Module) -> Tensor | float:
    return layer.bias.detach().clone() if isinstance(layer.bias, Tensor) else 0.0


def _rounds_inputs(grid: LearnedGrid) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda _, inputs: (grid(inputs[0]), *inputs[1:])


def _rounds_outputs(grid: LearnedGrid) -> Callable[[nn.Module, object, Tensor], Tensor]:
    return lambda _, __, output: grid(output)
