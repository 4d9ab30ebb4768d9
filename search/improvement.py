"""What candidates would add to a front, by prediction."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


class Reached:
    """A front as far as it is known: AP points lost, and latency over the base's.

    Improvement is the hypervolume that a point adds, bounded by a largest loss and the base's latency. A gain
    of mAP counts as no loss, and so do the first points of one.

    Args:
        losses, ratios: `(K,)` of what was measured or is under way; what is beyond the bounds adds nothing.
        largest_loss: AP points.
        free: AP points that count as no loss; every loss counts so much less.
    """

    def __init__(self, losses: Values, ratios: Values, largest_loss: float, free: float = 0.0) -> None:
        inside = (losses < largest_loss) & (ratios < 1.0)
        order = np.argsort(losses[inside], kind="stable")
        self._starts = np.maximum(losses[inside][order] - free, 0.0)
        self._best = np.minimum.accumulate(ratios[inside][order])
        self._end, self._free = largest_loss - free, free

    def added(self, losses: Values, ratios: Values) -> Values:
        """Hypervolume `(M,)` that each of M points would add alone."""
        starts, best = np.append(0.0, self._starts), np.append(1.0, self._best)
        ends = np.append(self._starts, self._end)
        counted = np.maximum(losses - self._free, 0.0)
        wide = np.clip(ends - np.maximum(starts, counted[:, None]), 0.0, None)
        deep = np.clip(best - ratios[:, None], 0.0, None)
        total: Values = (wide * deep).sum(axis=1)
        return total
