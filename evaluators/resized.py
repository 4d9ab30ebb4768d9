"""The bench of a study at a smaller input, for the recipes that choose one."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from evaluators.bench import Bench
from evaluators.datasets.base import DetectionSplit
from evaluators.datasets.letterbox import LetterboxedImages
from spaces.inputs import Size, load_resized
from spaces.recipe import Recipe

DISTILLED = 0.25
"""Share of the distillation's weight that is left. The teacher is the base at the same smaller size: it sees
as little as the candidate and was not trained for it, so what there is to learn is in the labels."""


class ResizedBench(Bench):
    """Weights, data, space and target of a study's bench; images, teacher, ranges and layers of its own.

    Args:
        whole: at the study's size.
        size: one of those on offer.
    """

    def __init__(self, whole: Bench, size: Size) -> None:
        for name, value in vars(whole).items():
            if not isinstance(getattr(Bench, name, None), cached_property):  # those are of the size
                setattr(self, name, value)
        plan = whole.config.finetune
        less = plan.model_copy(update={"distill_weight": DISTILLED * plan.distill_weight})
        self.config = whole.config.model_copy(update={"size": size, "finetune": less})
        self.detector = whole.detector_at(size)
        self.base = self.detector.build()
        load_resized(self.base, whole.base, whole.detector.build())
        self.base.eval().requires_grad_(False)
        assert whole.sites.input is not None, "a size is on offer"
        self.sites = replace(whole.sites, facts=whole.sites.input.smaller[size])
        self.space, self.weights_hash = whole.space, whole.weights_hash
        self._whole = whole

    def at(self, recipe: Recipe) -> Bench:
        """The bench of a recipe: this one at its own size."""
        return self._whole.at(recipe)

    def images(self, split: DetectionSplit) -> LetterboxedImages:
        """The letterboxed images of a split; whoever comes first makes them while no one measures."""
        with self.slot.computing():
            return super().images(split)

    @property
    def base_timing_inputs(self) -> list[NDArray[np.float32]]:
        """The images as the base takes them, in full size."""
        return self._whole.timing_inputs
