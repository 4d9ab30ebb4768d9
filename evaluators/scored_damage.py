"""Damage that the AP alone tells, in the measure that all other choices have."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import nn

from evaluators.accuracy import score_session
from evaluators.bench import Bench
from evaluators.datasets.letterbox import spread
from evaluators.datasets.split import DetectionSplit, is_object
from evaluators.norms import measure_norms
from evaluators.torch_session import TorchSession
from spaces.recipe import Recipe

IMAGES = 128
"""Of select that are scored, at most."""
CALIBRATED = 32
"""Of fit, on which distances are taken: BatchNorm statistics of fewer cost more than many a choice."""
SHAKEN = (0.05, 0.1, 0.2, 0.4)
"""Standard deviations of the noise on weights, over those of the weights of a layer."""


class ScoredDamage:
    """What a smaller input or fewer boxes cost: the distance of a network that loses as much AP.

    Raw outputs at two sizes do not compare, and do not change with what is made of them; average precisions
    do. The task loss, on images that the base was trained on, put sizes in another order than AP. The AP that
    the base loses is looked up among those that it loses with noise on its weights, whose distances by the
    detector's own measure are known.

    Args:
        bench: at the study's size.
        count: images of select that are scored, those with objects first.
    """

    def __init__(self, bench: Bench, count: int = IMAGES) -> None:
        self._bench = bench
        split = bench.splits["select"]
        picked = scored_images(split, count)
        self._split = split.part(split.role, split.name, lambda image: image.id in picked)

    def of(self, recipe: Recipe) -> float:
        """Distance that stands for a recipe which leaves the weights alone; 0 where AP does not fall."""
        bench = self._bench.at(recipe)
        return equivalent(self._plain - self._score(bench, bench.base, recipe), *self._known)

    def _score(self, bench: Bench, network: nn.Module, recipe: Recipe | None = None) -> float:
        """AP in 0..100 of a network at the size of a bench, with a recipe's suppression."""
        session, look = TorchSession(bench.whole(network, recipe)), bench.detector.preprocess
        return score_session(session, self._split, bench.select, look)[0]["map"]

    @cached_property
    def _plain(self) -> float:
        return self._score(self._bench, self._bench.base)

    @cached_property
    def _known(self) -> tuple[list[float], list[float]]:
        """AP lost and distances of the base with more and more noise on its weights, norms measured anew."""
        bench, detector = self._bench, self._bench.detector
        images = bench.batch(bench.fit, CALIBRATED)

        def repaired(network: nn.Module) -> nn.Module:
            measure_norms(network, [images])
            return network

        base = repaired(copy.deepcopy(bench.base))
        plain = self._score(bench, base)
        lost, distances = [], []
        with torch.no_grad():
            wanted = base(images)
            for strength in SHAKEN:
                network = repaired(shaken(bench.base, strength))
                distances.append(float(detector.distillation(network(images), wanted)))
                lost.append(plain - self._score(bench, network))
        return lost, distances


def scored_images(split: DetectionSplit, count: int) -> set[int]:
    """Ids of up to `count` images, evenly spread: of those with objects, then of the others if that leaves
    room. Where few images have any, a spread over all of them might meet none.
    """
    objects = {one["image_id"] for one in split.annotations if is_object(one)}
    picked: set[int] = set()
    for wanted in (True, False):
        ids = [image.id for image in split.images if (image.id in objects) == wanted]
        picked |= {ids[int(k)] for k in spread(len(ids), count - len(picked))}
    return picked


def shaken(network: nn.Module, strength: float) -> nn.Module:
    """A copy with Gaussian noise on the weights of its layers, always the same noise times `strength`."""
    noisy = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(0)
    for parameter in noisy.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1 and parameter.is_floating_point():
            parameter.data += strength * parameter.data.std(correction=0) * noise
    return noisy


def equivalent(lost: float, losses: Sequence[float], distances: Sequence[float]) -> float:
    """The distance that goes with a loss of AP, by the line through 0 and the known pairs.

    Beyond the last pair it grows in proportion; where no known network loses, it is the largest distance.
    """
    known = np.maximum.accumulate([0.0, *losses])
    apart = np.maximum.accumulate([0.0, *distances])
    if lost <= 0:
        return 0.0
    if lost > known[-1]:
        return float(apart[-1] * (lost / known[-1] if known[-1] > 0 else 1.0))
    return float(np.interp(lost, known, apart))
