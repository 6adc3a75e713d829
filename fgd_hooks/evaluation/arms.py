"""The few statistics of a study: Student's t, exactly, and intervals of means of paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LEAST_GAP = 1.0
"""Points that a teacher must be better for a share of them to be stated: of less, any gain is many times as much."""


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


@dataclass(frozen=True)
class Record:
    """One collected run.

    Attributes:
        data: name of the data set.
        student: what the model is called.
        arm: name of the arm.
        epochs: trained.
        seed: of the run.
        cpu_s: CPU seconds of the training.
        results: figures by split, as ``fgd eval --json`` writes them.
        batches: checksum of the training batches; None where it was not taken.
        device: what it ran on; ``cpu_s`` of different ones are not compared.
        settings: everything else that shaped the run.
    """

    data: str
    student: str
    arm: str
    epochs: int
    seed: int
    cpu_s: float
    results: dict[str, dict[str, Any]]
    batches: int | None
    device: str = "cpu"
    settings: str = ""

    def value(self, split: str) -> float | None:
        """mAP50-95 on a split, per cent; None where it was not measured."""
        found = self.results.get(split, {}).get("map50_95")
        return None if found is None else 100 * float(found)


@dataclass(frozen=True)
class Arm:
    """The runs of one arm on one data set, one per seed."""

    name: str
    epochs: int
    runs: tuple[Record, ...]

    def values(self, split: str) -> dict[int, float]:
        """mAP50-95 by seed, per cent."""
        return {run.seed: value for run in self.runs if (value := run.value(split)) is not None}


@dataclass(frozen=True)
class Group:
    """All arms of one data set with one student, and the teacher's figures there.

    Attributes:
        data: name of the data set.
        student: what the model is called.
        arms: in the order of the study.
        baseline: the arm that the others are compared with; None where it has no run.
        teacher: its record.
    """

    data: str
    student: str
    arms: tuple[Arm, ...]
    baseline: Arm | None
    teacher: Record | None

    def splits(self) -> list[str]:
        """The splits that were measured, val first."""
        return [split for split in ("val", "test") if any(arm.values(split) for arm in self.arms)]

    def gain(self, arm: Arm, split: str, over: Arm | None = None) -> Interval | None:
        """The mean of the differences, seed by seed, in points, to another arm; None without a common seed.

        Args:
            arm: that is looked at.
            split: "val" or "test".
            over: what it is compared with; None: the baseline.
        """
        over = over or self.baseline
        if over is None or arm is over:
            return None
        base, mine = over.values(split), arm.values(split)
        differences = [mine[seed] - base[seed] for seed in mine if seed in base]
        return mean_interval(differences) if differences else None

    def closed(self, arm: Arm, split: str) -> float | None:
        """The gain as a share of what the teacher is above the baseline; None where that is less than a point."""
        gain, teacher = self.gain(arm, split), self.teacher.value(split) if self.teacher else None
        if gain is None or teacher is None or self.baseline is None:
            return None
        base = self.baseline.values(split)
        gap = teacher - statistics.fmean(base[seed] for seed in arm.values(split) if seed in base)
        return gain.mean / gap if gap >= LEAST_GAP else None

    def cost(self, arm: Arm) -> float | None:
        """CPU seconds as a multiple of the baseline's, the mean over common seeds on like devices."""
        return None if self.baseline is None else cost_ratio(arm, self.baseline)


def cost_ratio(arm: Arm, other: Arm) -> float | None:
    """CPU seconds of an arm as a multiple of another's, the mean over common seeds on like devices."""
    base = {(run.seed, run.device): run.cpu_s for run in other.runs if run.cpu_s}
    ratios = [run.cpu_s / base[run.seed, run.device] for run in arm.runs if (run.seed, run.device) in base]
    return statistics.fmean(ratios) if ratios else None
