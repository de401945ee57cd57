"""Rates of rare things, with intervals that hold for few images and for none found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Rate:
    """So many of so many, and the interval (Wilson, 1927) in which the true share lies with 95 % confidence."""

    count: int
    total: int
    value: float
    """count / total."""
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """One rate less another, and its interval of 95 % confidence (Newcombe, 1998, method 10)."""

    value: float
    low: float
    high: float


def rate(count: int, total: int) -> Rate:
    """`count` of `total` with Wilson's score interval, which stays in [0, 1] and has a width even if count is 0.

    Raises:
        ValueError: not 0 <= count <= total, or total is 0.
    """
    if not 0 <= count <= total or total == 0:
        raise ValueError(f"{count} of {total} is no rate; expected 0 <= count <= total, and total > 0.")
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, shrink = count / total, z * z / total
    middle = (share + shrink / 2) / (1 + shrink)
    half = z / (1 + shrink) * math.sqrt(share * (1 - share) / total + shrink / (4 * total))
    # Exactly 0 and 1 at the ends, where rounding would leave a trace.
    low = 0.0 if count == 0 else middle - half
    high = 1.0 if count == total else middle + half
    return Rate(count, total, share, low, high)


def difference(first: Rate, second: Rate) -> Difference:
    """first - second, of independent images, with the hybrid of both score intervals."""
    value = first.value - second.value
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    return Difference(value, value - below, value + above)
