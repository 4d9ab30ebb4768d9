"""The statistics of the paired latency protocol: interval of a median, drift, balanced orders."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import comb
from statistics import median

FEWEST_ROUNDS = 6
"""With fewer samples there is no 95 % interval of a median: 2 * 0.5**6 is the first tail below 5 %."""


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Distribution-free 95 % interval of the median, from order statistics.

    With n independent samples the median lies between the k-th smallest and the k-th largest with
    probability 1 - 2 P(B < k), B ~ Binomial(n, 1/2); k is the largest that keeps this at 95 % or more
    (David and Nagaraja, Order Statistics, 3rd ed., 2003, section 7.1). Below `FEWEST_ROUNDS` samples there
    is no such k, and the interval is all of the samples.
    """
    ordered = sorted(samples)
    rank = _interval_rank(len(ordered))
    return ordered[rank - 1], ordered[-rank]


@cache
def _interval_rank(n: int) -> int:
    k, tail = 0, 0
    while (tail := tail + comb(n, k)) <= 0.025 * 2**n:
        k += 1
    return max(k, 1)


def base_drift(base_ms: Sequence[float], images: int) -> float:
    """How far the last third of the samples is from the first, 0.1 = 10 % slower or faster.

    Images differ in their work, so thirds are compared image by image where an image is in both; the
    median over the images counts.
    """
    third = len(base_ms) // 3
    first, last = list(enumerate(base_ms))[:third], list(enumerate(base_ms))[-third:]
    changes = []
    for image in range(images):
        before = [ms for i, ms in first if i % images == image]
        after = [ms for i, ms in last if i % images == image]
        if before and after:
            changes.append(median(after) / median(before))
    if not changes:
        changes = [median(ms for _, ms in last) / median(ms for _, ms in first)]
    change = median(changes)
    return max(change, 1 / change) - 1


def balanced_orders(count: int) -> list[list[int]]:
    """Orders in which every item stands equally often in each place and after each other item.

    Williams' design (Australian J. of Scientific Research A 2, 1949): a model that leaves the caches
    cold harms each of the others alike. `count` orders for an even count, twice as many for an odd one.
    """
    zigzag = [(i + 1) // 2 if i % 2 else (count - i // 2) % count for i in range(count)]
    orders = [[(item + shift) % count for item in zigzag] for shift in range(count)]
    return orders if count % 2 == 0 else orders + [order[::-1] for order in orders]
