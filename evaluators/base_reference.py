"""The base as it is exported: what candidates are timed against, and what their AP is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from evaluators.accuracy import category_matches
from evaluators.bench import Bench
from evaluators.bootstrap import CategoryMatches, difference_interval
from evaluators.targets.base import Detections, Session

DRAWN = 80_000
RESAMPLES = (100, 500)
"""Images that all resamples draw together, within these numbers of resamples: an interval takes a second, on
thousands of images too."""


class BaseReference:
    """One for each process; the file, its detections on select and their matches are made on first use.

    Args:
        bench: of the study, at the base's own input size.
        folder: of the base's file.
    """

    def __init__(self, bench: Bench, folder: Path) -> None:
        self._bench, self._folder = bench, folder

    @cached_property
    def session(self) -> Session:
        """The base in float32, loaded."""
        with self._bench.slot.computing():
            return self._bench.target.prepare(
                self._bench.base_model(self._folder), self._bench.config.threads
            )

    def difference(self, found: Mapping[int, Detections]) -> tuple[float, float, float]:
        """mAP on select of a candidate's detections minus the base's, with its 95 % interval over images.

        NaN where resamples have no objects.
        """
        split = self._bench.splits["select"]
        matches = self._matches
        with self._bench.slot.computing():
            images = len(split.images)
            resamples = min(max(DRAWN // max(images, 1), RESAMPLES[0]), RESAMPLES[1])
            theirs = category_matches(split, found)
            return difference_interval(theirs, matches, images, resamples, self._bench.config.seed)

    @cached_property
    def _matches(self) -> list[CategoryMatches]:
        _, found = self._bench.scored(self.session)
        with self._bench.slot.computing():
            return category_matches(self._bench.splits["select"], found)
