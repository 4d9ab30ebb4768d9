"""How long the stages of a job took."""

from __future__ import annotations

import time

from evaluators.jobs import StageReport
from evaluators.quiet import QuietSlot


class StageClock:
    """Seconds per stage; the time suspended for measurements of others is kept apart, as `suspended`."""

    def __init__(self, slot: QuietSlot) -> None:
        self._slot = slot
        self._started = self._last = time.perf_counter()
        self._waited = slot.waited_seconds
        self.seconds: dict[str, float] = {"suspended": 0.0}

    def ended(self, stage: str, coming: str) -> StageReport:
        """The report of a stage that has just ended."""
        now, waited = time.perf_counter(), self._slot.waited_seconds
        took, held = now - self._last, waited - self._waited
        self._last, self._waited = now, waited
        self.seconds[stage] = round(took - held, 3)
        self.seconds["suspended"] = round(self.seconds["suspended"] + held, 3)
        return StageReport(stage=stage, seconds=took, waited=held, next_stage=coming)

    @property
    def total(self) -> float:
        """Seconds since the job began."""
        return time.perf_counter() - self._started
