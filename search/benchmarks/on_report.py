"""Exported files scored on report, beside the base's."""

from __future__ import annotations

from pathlib import Path

from evaluators.accuracy import map_difference_interval
from evaluators.bench import Bench
from evaluators.targets.base import Detections
from search.benchmarks.methods import session_of


class OnReport:
    """Scores files on report.

    Attributes:
        base: AP of the base, 0..100.

    Args:
        bench: whose base is exported first.
        folder: where to.
    """

    def __init__(self, bench: Bench, folder: Path) -> None:
        self._bench, self._split = bench, bench.split("report")
        with bench.slot.computing():
            file = bench.base_model(folder)
        self.base, self._reference = self._found(file)

    def __call__(self, file: Path) -> tuple[float, tuple[float, float, float]]:
        """AP of a file, and its difference to the base's with a 95 % interval over images."""
        figure, found = self._found(file)
        return figure, map_difference_interval(self._split, found, self._reference)

    def _found(self, file: Path) -> tuple[float, dict[int, Detections]]:
        figures, found = self._bench.scored(session_of(self._bench, file), self._split)
        return figures["map"], found
