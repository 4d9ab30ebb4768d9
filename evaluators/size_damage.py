"""Damage of a smaller input, in the measure that all other choices have."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from evaluators.bench import Bench
from evaluators.datasets.letterbox import decode, letterbox, network_input, spread
from evaluators.finetune import measure_norms
from spaces.detectors.base import Detector, Labels, Outputs
from spaces.recipe import Recipe

IMAGES = 32
SHAKEN = (0.05, 0.1, 0.2, 0.4)
"""Standard deviations of the noise on weights, over those of the weights of a layer."""


class SizeDamage:
    """What a smaller input costs: the distance of a full-sized network that loses as much.

    Raw outputs at two sizes do not compare, task losses do. The loss that the base gains at the smaller size,
    on the same images, is looked up among those of the base with noise on its weights, whose distances by the
    detector's own measure are known. BatchNorm statistics are measured anew on all sides.

    Args:
        bench: at the study's size.
        count: images of fit that are looked at; a loss needs more of them than a distance.
    """

    def __init__(self, bench: Bench, count: int = IMAGES) -> None:
        self._bench = bench
        self._picked = [int(k) for k in spread(len(bench.fit), count)]

    def of(self, recipe: Recipe) -> float:
        """Distance that stands for the input size of a recipe; 0 where the loss does not grow."""
        small = self._bench.at(recipe)
        inputs, labels = self._images(small.detector)
        with torch.no_grad():
            loss = small.detector.loss(_outputs(copy.deepcopy(small.base), inputs), labels)
        return equivalent(float(loss) - self._plain[0], *self._known)

    def _images(self, detector: Detector) -> tuple[Tensor, list[Labels]]:
        """The picked images and their boxes as a detector takes them."""
        fit, look = self._bench.fit, detector.preprocess
        pixels, labels = [], []
        for k in self._picked:
            picture, scale = letterbox(decode(fit.split.images[k]), look.size, look.pad_value, look.fit)
            found = fit.labels(k)
            pixels.append(picture)
            across_and_down = torch.from_numpy(scale / fit.scales[k]).float()
            labels.append(Labels(found.boxes * across_and_down.repeat(2), found.classes))
        return torch.from_numpy(network_input(np.stack(pixels), look)), labels

    @cached_property
    def _full(self) -> tuple[Tensor, list[Labels]]:
        return self._images(self._bench.detector)

    @cached_property
    def _plain(self) -> tuple[float, Outputs]:
        """Task loss and outputs of the base at its own size."""
        inputs, labels = self._full
        outputs = _outputs(copy.deepcopy(self._bench.base), inputs)
        with torch.no_grad():
            return float(self._bench.detector.loss(outputs, labels)), outputs

    @cached_property
    def _known(self) -> tuple[list[float], list[float]]:
        """Losses gained and distances of the base with more and more noise on its weights."""
        detector, (inputs, labels), (loss, wanted) = self._bench.detector, self._full, self._plain
        gained, distances = [], []
        for strength in SHAKEN:
            outputs = _outputs(shaken(self._bench.base, strength), inputs)
            with torch.no_grad():
                gained.append(float(detector.loss(outputs, labels)) - loss)
                distances.append(float(detector.distillation(outputs, wanted)))
        return gained, distances


def _outputs(network: nn.Module, inputs: Tensor) -> Outputs:
    """Of a network that is taken over, once its norms are measured on the same images."""
    measure_norms(network, [inputs])
    with torch.no_grad():
        outputs: Outputs = network(inputs)
    return outputs


def shaken(network: nn.Module, strength: float) -> nn.Module:
    """A copy with Gaussian noise on the weights of its layers, always the same noise times `strength`."""
    noisy = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(0)
    for parameter in noisy.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.data += strength * parameter.data.std(correction=0) * noise
    return noisy


def equivalent(gained: float, losses: Sequence[float], distances: Sequence[float]) -> float:
    """The distance that goes with a gained loss, by the line through 0 and the known pairs.

    Beyond the last pair it grows in proportion; where no known loss grows, it is the largest distance.
    """
    known = np.maximum.accumulate([0.0, *losses])
    apart = np.maximum.accumulate([0.0, *distances])
    if gained <= 0:
        return 0.0
    if gained > known[-1]:
        return float(apart[-1] * (gained / known[-1] if known[-1] > 0 else 1.0))
    return float(np.interp(gained, known, apart))
