"""The few statistics of a study: Student's t, exactly, and intervals of means of paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval.

    Attributes:
        mean: of the values.
        half: half the width of the interval; None for a single value, of which nothing is known.
        count: number of values.
    """

    mean: float
    half: float | None
    count: int

    @property
    def low(self) -> float:
        """The lower end; minus infinity for a single value."""
        return -math.inf if self.half is None else self.mean - self.half

    @property
    def high(self) -> float:
        """The upper end; infinity for a single value."""
        return math.inf if self.half is None else self.mean + self.half


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The t-interval of the mean of a sample.

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("an interval needs one value or more")
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, None, 1)
    half = t_quantile(confidence, count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, half, count)


def t_quantile(confidence: float, freedom: int) -> float:
    """The t for which Student's distribution holds ``confidence`` between -t and t.

    Args:
        confidence: between 0 and 1.
        freedom: degrees of freedom, 1 or more.

    Raises:
        ValueError: values outside these bounds.
    """
    if not 0 < confidence < 1 or freedom < 1:
        raise ValueError(f"confidence {confidence} and freedom {freedom}: expected 0 < confidence < 1 and freedom >= 1")
    low, high = 0.0, math.pi / 2
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return math.tan(middle) * math.sqrt(freedom)
        if _within(middle, freedom) < confidence:
            low = middle
        else:
            high = middle


def _within(angle: float, freedom: int) -> float:
    """The share of the distribution between -t and t for t = sqrt(freedom) tan(angle).

    The finite sums for whole degrees of freedom: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and
    26.7.4.
    """
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = (cosine if odd else 1.0) if freedom > 1 else 0.0
    for power in range(2 + odd, freedom - 1, 2):  # of the cosine
        term *= cosine * cosine * (power - 1) / power
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
