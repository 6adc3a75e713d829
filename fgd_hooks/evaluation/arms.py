"""Arms and what sets them apart: runs by seed, paired differences with their intervals, costs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from fgd_hooks.errors import StudyError

TAKEN = ("teacher", "pretrain")
"""Names that no arm may have: those of the runs that arms need."""

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

    def __str__(self) -> str:
        """``+0.7 .. +5.1``; ``one seed`` where there is no interval."""
        return "one seed" if self.half is None else f"{self.low:+.1f} .. {self.high:+.1f}"


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The t-interval of the mean of a sample."""
    if not values:
        raise ValueError("an interval needs one value or more")
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, None, 1)
    half = t_quantile(confidence, count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, half, count)


def t_quantile(confidence: float, freedom: int) -> float:
    """The t for which Student's distribution holds ``confidence`` between -t and t."""
    if not 0 < confidence < 1 or freedom < 1:
        raise ValueError(f"confidence {confidence} and freedom {freedom}: expected 0 < confidence < 1 and freedom >= 1")
    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return math.tan(middle) * math.sqrt(freedom)


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
    """The figures of one finished run.

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
        settings: everything else that shaped the run, as text.
        kept: all that was kept of the run, these figures among it.
    """

    data: str
    student: str
    arm: str
    epochs: int
    seed: int
    cpu_s: float
    results: dict[str, dict[str, Any]]
    batches: int | None = None
    device: str = "cpu"
    settings: str = ""
    kept: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any], data: str = "") -> Record:
        """From what a finished run wrote; ``data`` stands in where that does not name its data set."""
        return cls(
            data=kept.get("data", data),
            **{key: kept[key] for key in ("student", "arm", "epochs", "seed", "cpu_s", "results")},
            batches=kept.get("batches"),
            device=kept.get("device", "cpu"),
            settings=json.dumps([kept.get(key) for key in ("settings", "fgd", "scale")], sort_keys=True),
            kept=kept,
        )

    def value(self, split: str, key: str = "map50_95") -> float | None:
        """A figure on a split, per cent; None where it was not measured."""
        found = self.results.get(split, {}).get(key)
        return None if found is None else 100 * float(found)

    def classes(self, split: str) -> dict[str, float | None]:
        """mAP50-95 by class on a split, per cent; None for a class without boxes."""
        values = {entry["name"]: entry["map50_95"] for entry in self.results.get(split, {}).get("per_class", ())}
        return {name: None if value is None else 100 * float(value) for name, value in values.items()}


class Seeded(Protocol):
    """What every run tells, whatever it was read from."""

    @property
    def seed(self) -> int:
        """Of the run."""

    @property
    def epochs(self) -> int:
        """Trained."""


R = TypeVar("R", bound=Seeded)


@dataclass(frozen=True)
class Arm(Generic[R]):
    """Runs that differ in nothing but the seed.

    Attributes:
        name: of the arm.
        runs: by ascending seed.
    """

    name: str
    runs: tuple[R, ...]

    @property
    def epochs(self) -> int:
        """Epochs of its first run, and of all in a study."""
        return self.runs[0].epochs

    def values(self, of: Callable[[R], float | None]) -> list[float]:
        """One value per run, without those that have none."""
        return [value for run in self.runs if (value := of(run)) is not None]

    def by_seed(self, of: Callable[[R], float | None]) -> dict[int, float]:
        """The same by seed, where each seed has one run."""
        return {run.seed: value for run in self.runs if (value := of(run)) is not None}


@dataclass(frozen=True)
class Comparison:
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
    arms: tuple[Arm[Record], ...]
    baseline: Arm[Record] | None
    teacher: Record | None

    @property
    def splits(self) -> list[str]:
        """The splits that were measured, val first."""
        return [split for split in ("val", "test") if any(self.values(arm, split) for arm in self.arms)]

    def arm(self, name: str) -> Arm[Record] | None:
        """The arm of that name; None where it has no run."""
        return next((arm for arm in self.arms if arm.name == name), None)

    def values(self, arm: Arm[Record], split: str) -> dict[int, float]:
        """mAP50-95 by seed, per cent."""
        return arm.by_seed(lambda run: run.value(split))

    def differences(self, arm: Arm[Record], split: str, over: Arm[Record] | None = None) -> dict[int, float]:
        """What an arm has more than another, or than the baseline, with the same seed: points by seed."""
        over = over or self.baseline
        if over is None or arm is over:
            return {}
        base = self.values(over, split)
        return {seed: value - base[seed] for seed, value in self.values(arm, split).items() if seed in base}

    def gain(self, arm: Arm[Record], split: str, over: Arm[Record] | None = None) -> Interval | None:
        """The mean of these differences; None without a common seed."""
        found = self.differences(arm, split, over)
        return mean_interval(list(found.values())) if found else None

    def closed(self, arm: Arm[Record], split: str) -> float | None:
        """The gain as a share of what the teacher is above the baseline; None where that is less than a point."""
        gain, teacher = self.gain(arm, split), self.teacher.value(split) if self.teacher else None
        if gain is None or teacher is None or self.baseline is None:
            return None
        base = self.values(self.baseline, split)
        gap = teacher - statistics.fmean(base[seed] for seed in self.differences(arm, split))
        return gain.mean / gap if gap >= LEAST_GAP else None

    def cost(self, arm: Arm[Record], over: Arm[Record] | None = None) -> float | None:
        """CPU seconds as a multiple of another arm's, or of the baseline's: the mean over common seeds on like devices.

        None where there are none.
        """
        over = over or self.baseline
        base = {(run.seed, run.device): run.cpu_s for run in over.runs if run.cpu_s} if over else {}
        ratios = [run.cpu_s / base[run.seed, run.device] for run in arm.runs if (run.seed, run.device) in base]
        return statistics.fmean(ratios) if ratios else None

    def same_batches(self, arm: Arm[Record]) -> bool | None:
        """Whether an arm was fed the baseline's batches, pixel by pixel; None without a common seed."""
        base = {run.seed: run.batches for run in self.baseline.runs} if self.baseline else {}
        found = [run.batches == base[run.seed] for run in arm.runs if run.seed in base]
        return all(found) if found else None


def compare_arms(records: Sequence[Record], order: Sequence[str] = (), baseline: str = "alone") -> list[Comparison]:
    """A comparison for each data set and student; arms in the given order, then by name."""
    teachers = {record.data: record for record in records if record.arm == "teacher"}
    places = {name: place for place, name in enumerate(order)}
    groups: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for record in sorted(records, key=lambda each: (places.get(each.arm, len(places)), each.arm, each.seed)):
        if record.arm not in TAKEN:
            groups.setdefault((record.data, record.student), {}).setdefault(record.arm, []).append(record)
    found = []
    for (data, student), members in sorted(groups.items()):
        for name, runs in members.items():
            if len({run.seed for run in runs}) < len(runs) or len({(run.epochs, run.settings) for run in runs}) > 1:
                raise StudyError(
                    f"{data}, {student}, {name}: runs with equal seeds, or with different epochs or settings; collect "
                    "anew."
                )
        arms = {name: Arm(name, tuple(runs)) for name, runs in members.items()}
        found.append(Comparison(data, student, tuple(arms.values()), arms.get(baseline), teachers.get(data)))
    return found
