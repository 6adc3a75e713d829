"""Typed configuration: plain dataclasses, read from YAML, from dicts and from ``key=value`` texts."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fgd_hooks.errors import ConfigError
from fgd_hooks.utils.recipes import recipe_path
from fgd_hooks.utils.structured_config import Schema, load


def bound(possible: Callable[[Any], object], expected: str) -> dict[str, Any]:
    """Metadata for a field: which values are possible (null, where the type allows it, in any case)."""

    def safe(found: Any) -> bool:
        with contextlib.suppress(TypeError, ValueError):  # a text has no size
            return bool(possible(found))
        return False

    return {"bound": (safe, expected)}


def at_least(least: int, unit: str = "") -> dict[str, Any]:
    """The bound of a whole number."""
    return bound(lambda found: isinstance(found, int) and found >= least, f"{least} or more{unit}")


def one_of(*known: str) -> dict[str, Any]:
    """The bound of a name."""
    return bound(lambda found: found in known, "one of " + ", ".join(map(repr, known)))


def moment(value: float | str) -> tuple[float, bool]:
    """A point of a training as a number, and whether that counts epochs ("12 epochs"); otherwise it is a fraction.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, str):
        number, unit, rest = value.partition("epoch")
        if not unit or rest not in ("", "s"):
            raise ValueError(value)
        return int(number), True
    if not 0 <= value <= 1:
        raise ValueError(value)
    return float(value), False


ABOVE_0 = bound(lambda found: math.isfinite(found) and found > 0, "a finite number above 0")
FROM_0 = bound(lambda found: math.isfinite(found) and found >= 0, "a finite number, 0 or more")
MOMENT = bound(
    lambda found: moment(found)[0] >= 0, 'a fraction of the training from 0 to 1, or epochs as in "12 epochs"'
)
NAMES = bound(
    lambda found: isinstance(found, (list, tuple)) and found and all(isinstance(each, str) for each in found),
    "null or a list of at least one text",
)
INHERITED = one_of("auto", "channels", "fitted", "neck", "head", "neck+head", "")


class Section:
    """Base of a configuration's dataclasses: values are checked whenever one is made, types when it is loaded."""

    prefix = ""  # of the keys in messages

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):  # type: ignore[arg-type]
            found, section = getattr(self, each.name), each.default_factory
            if isinstance(section, type) and issubclass(section, Section):
                self.require(each.name, isinstance(found, section), "a section")
            elif "bound" in each.metadata and found is not None:
                possible, expected = each.metadata["bound"]
                self.require(each.name, possible(found), expected)

    def require(self, name: str, holds: bool, expected: str) -> None:
        """Raise a ConfigError that names key, value and what is expected, unless ``holds``."""
        if not holds:
            raise ConfigError(f"{self.prefix}{name} is {getattr(self, name)!r}; expected {expected}.")


@dataclass
class LossConfig(Section):
    """Which loss compares a student level with a teacher level, and its weights.

    Args:
        name: a registered loss ("fgd", "imitation", or one of your own).
        preset: the paper's weights for a kind of detector, for "fgd": two_stage, anchor_based, anchor_free or fcos.
        options: arguments of the loss by name; for "fgd" they replace the preset's
            (temperature, alpha, beta, gamma, lambda_).
        weight: of this loss beside others. Where the balance is measured, it multiplies ``balance.ratio``; otherwise
            the loss.
    """

    prefix = "loss."

    name: str = "fgd"
    preset: str = "anchor_based"
    options: dict[str, Any] = field(default_factory=dict)
    weight: float = field(default=1.0, metadata=ABOVE_0)


@dataclass
class TeacherShare(Section):
    """One of several teachers, an entry of ``teachers``.

    Args:
        name: what it is loaded from, where an integration is given no teacher of its own.
        weight: of all that this teacher teaches; as ``loss.weight``.
        taps: this teacher's levels, instead of ``teacher_taps``.
        student_taps: the student's levels that this teacher teaches, instead of the common ``student_taps``.
        levels: names of the levels that this teacher teaches, instead of the common ``levels``.
    """

    name: str | None = None
    weight: float = field(default=1.0, metadata=ABOVE_0)
    taps: list[str] | None = None
    student_taps: list[str] | None = None
    levels: list[str] | None = None


@dataclass
class BalanceConfig(Section):
    """How strong the distillation is (see fgd_hooks/balance.py).

    Args:
        mode: "gradient" measures the scale, "fixed" uses the loss's weights as they are.
        ratio: target of |gradient of the distillation| / |gradient of the task| at the tapped student feature.
        per_level: one scale for each level, or one for all.
        momentum: of the moving average of the measured scale, 0 to below 1.
        interval: distilling steps from one measurement to the next; in a step that measures, the student learns from
            the task alone.
        min_scale: lower bound of the scale.
        max_scale: upper bound of the scale.
        max_change: largest factor by which one measurement may raise the scale.
        image_limit: at each level, what an image adds to the distillation's gradient is at most so many times what the
            median image of the batch adds; null: no limit, as in mode "fixed".
    """

    prefix = "balance."

    mode: str = field(default="gradient", metadata=one_of("gradient", "fixed"))
    ratio: float = field(default=1.0, metadata=ABOVE_0)
    per_level: bool = True
    momentum: float = field(default=0.5, metadata=bound(lambda found: 0 <= found < 1, "a number from 0 to below 1"))
    interval: int = field(default=10, metadata=at_least(2, " steps"))
    min_scale: float = field(default=1e-8, metadata=ABOVE_0)
    max_scale: float = field(default=1e8, metadata=ABOVE_0)
    max_change: float = field(default=2.0, metadata=bound(lambda found: found > 1, "a factor above 1"))
    image_limit: float | None = field(default=2.0, metadata=bound(lambda found: found >= 1, "1 or more, or null"))

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = f"at most balance.max_scale ({self.max_scale})"
        self.require("min_scale", self.min_scale <= self.max_scale, expected)


@dataclass
class ScheduleConfig(Section):
    """The weight over time (see fgd_hooks/schedule.py).

    Args:
        kind: "constant", "linear" or "cosine" decay from 1 to ``end``.
        warmup_steps: steps over which the weight rises from 0 at the start of the training.
        start: where the distillation begins: a fraction of the training, 0 to 1, or epochs as in "12 epochs".
        stop: where it ends, in the same way (a fraction is without effect where the loop does not say how many epochs
            there are); null, never.
        end: the factor at the end of a decay.
    """

    prefix = "schedule."
    renamed = (("start_epoch", "start"), ("stop_epoch", "stop"))  # old and new names

    kind: str = field(default="constant", metadata=one_of("constant", "linear", "cosine"))
    warmup_steps: int = field(default=0, metadata=at_least(0))
    start: int | float | str = field(default=0.0, metadata=MOMENT)
    stop: int | float | str | None = field(default=0.35, metadata=MOMENT)
    end: float = field(default=0.0, metadata=bound(lambda found: 0 <= found <= 1, "a number from 0 to 1"))

    def __post_init__(self) -> None:
        super().__post_init__()
        start, stop = (None if each is None else moment(each) for each in (self.start, self.stop))
        if stop is not None and start is not None:
            self.require("stop", stop[0] > 0, "more than 0, or null")
            if start[1] == stop[1]:
                self.require("stop", stop[0] > start[0], f"more than schedule.start ({self.start})")


@dataclass
class TeacherConfig(Section):
    """How the frozen teacher runs.

    Args:
        dtype: the precision of its forward pass, by autocast: "float32", "bfloat16", "float16", or "auto": that of the
            loop around it; the Ultralytics callback takes bfloat16 where the loop has no autocast and the processor
            multiplies bfloat16 fast.
        fuse: let a teacher that an integration loads from a file itself fold its batch normalisations into its
            convolutions and keep its weights in channels-last order (exact up to rounding, faster).
        compile: run its forward pass, up to the last tap, through ``torch.compile``. Where that fails, one warning, and
            the teacher runs as it is.
        name: what it was loaded from. Nothing is loaded by it: an integration notes it in the ``fgd.yaml`` of a run.
    """

    prefix = "teacher."

    dtype: str = field(default="auto", metadata=one_of("auto", "float32", "bfloat16", "float16"))
    fuse: bool = True
    compile: bool = False
    name: str | None = None


@dataclass
class OptimizerConfig(Section):
    """The optimiser of adapters and context blocks where an integration owns it (AdamW).

    Args:
        lr: learning rate at the start; it follows the host's schedule.
        weight_decay: AdamW's.
        clip: largest norm of their gradient.
    """

    prefix = "optimizer."

    lr: float = field(default=1e-3, metadata=ABOVE_0)
    weight_decay: float = field(default=1e-4, metadata=FROM_0)
    clip: float = field(default=10.0, metadata=ABOVE_0)


@dataclass
class FGDConfig(Section):
    """Everything about one distillation.

    Args:
        weight: of the whole distillation; 0 switches it off, and the run is the stock run (but for an ``inherit`` other
            than "auto").
        interval: distil every so many steps; the teacher rests in the others.
        student_taps: where the student's levels are (names, globs); null: the maps that feed its head.
        teacher_taps: the same for the teacher.
        levels: names of the levels to use ("P3", ...) out of those that pair; null: all.
        adapter: a registered adapter, or "auto" (identity where channels match, fitted elsewhere).
        resize: resample the student's map where its size differs from the teacher's; an error otherwise.
        inherit: what the student takes over from the teacher before a training begins (:func:`fgd_hooks.initialize`).
            "channels": evenly spaced channels of every layer (weight selection); "fitted": the same, and then each
            convolution is fitted to what the teacher's computes on some training images (reconstruction); "auto": as
            "fitted", of what was not trained yet: the whole student where nine tenths of its parameters are replaced
            so, else neck and head behind a trained backbone; "neck", "head" or "neck+head": these, where their shapes
            are equal (the paper's inheriting strategy); null or empty: nothing.
        boxes_from: where the Ultralytics callback takes the boxes of the foreground from: "labels", or, in a segment
            training, "masks": the box around what is seen of each instance.
        losses: several losses at once instead of ``loss``: names or sections like it, as in
            ``[fgd, {name: cwd, weight: 0.5}]``. Each has adapters and scales of its own.
        teachers: settings for each of several teachers, in their order: sections as :class:`TeacherShare`, or names.
        score_taps: for a loss that needs the teacher's class scores: the modules of the teacher that return them, one
            for each of its levels, finest first; null: found by an integration.
        max_bad_steps: this many steps in a row without a finite distillation loss end the training with an error.
        log_interval: steps from one TensorBoard record to the next; 0: none, no pictures either.
        image_interval: epochs from one set of attention pictures in TensorBoard to the next; 0: none; null: ten, or
            more where epochs are short, so that drawing stays a small share of the training's time.
    """

    renamed = (("every", "interval"),)  # old and new name

    weight: float = field(default=1.0, metadata=FROM_0)
    interval: int = field(default=1, metadata=at_least(1, " steps"))
    student_taps: list[str] | None = field(default=None, metadata=NAMES)
    teacher_taps: list[str] | None = field(default=None, metadata=NAMES)
    levels: list[str] | None = field(default=None, metadata=NAMES)
    adapter: str = "auto"
    resize: bool = False
    inherit: str | None = field(default="auto", metadata=INHERITED)
    boxes_from: str = field(default="labels", metadata=one_of("labels", "masks"))
    losses: list[Any] = field(default_factory=list)
    teachers: list[Any] = field(default_factory=list)
    score_taps: list[str] | None = field(default=None, metadata=NAMES)
    max_bad_steps: int = field(default=50, metadata=at_least(1))
    log_interval: int = field(default=10, metadata=at_least(0))
    image_interval: int | None = field(default=None, metadata=at_least(0))
    loss: LossConfig = field(default_factory=LossConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        self.losses = _sections("losses", self.losses, LossConfig)
        self.teachers = _sections("teachers", self.teachers, TeacherShare)
        super().__post_init__()
        if self.losses and self.loss != LossConfig():
            raise ConfigError("Both loss and losses are given; move loss into the list losses.")

    @property
    def all_losses(self) -> list[LossConfig]:
        """``losses``, or ``loss`` alone."""
        return self.losses or [self.loss]

    @property
    def has_zero_weights(self) -> bool:
        """Whether a part of a loss is switched off, so that some parameters of the distiller get no gradient."""
        options = [value for loss in self.all_losses for value in loss.options.values()]
        return any(value == 0 for value in options if isinstance(value, (int, float)))

    @property
    def names_places(self) -> bool:
        """Whether taps or levels are named, which may be wrong."""
        shares = [named for share in self.teachers for named in (share.taps, share.student_taps, share.levels)]
        return any([self.student_taps, self.teacher_taps, self.levels, *shares])

    @property
    def teacher_names(self) -> list[str | None]:
        """What each teacher was loaded from, where that is noted."""
        return [share.name for share in self.teachers] or [self.teacher.name]


def load_config(
    config: FGDConfig | Mapping[str, Any] | str | Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
) -> FGDConfig:
    """Build a checked configuration.

    Args:
        config: a configuration, a (nested) dict, a YAML file, the name of a recipe (``yolo``, ``paper/fcos``); None:
            the defaults.
        overrides: ``["balance.ratio=1", ...]`` or ``{"balance.ratio": 1, ...}``; they win.

    Raises:
        FileNotFoundError: neither a file nor a recipe has that name.
        ConfigError: an unknown key, a wrong type or an impossible value; the message names the key, the place it came
            from and the nearest known key.
    """
    return load(FGDConfig, recipe_path(config) if isinstance(config, (str, Path)) else config, overrides)


def config_to_dict(config: FGDConfig) -> dict[str, Any]:
    """The configuration as nested plain values, for YAML and for side files."""
    return dataclasses.asdict(config)


def save_config(config: FGDConfig, path: str | Path) -> None:
    """Write the configuration as YAML; :func:`load_config` reads it back."""
    OmegaConf.save(OmegaConf.create(config_to_dict(config)), path)


def _sections(key: str, entries: Sequence[Any], schema: type[Schema]) -> list[Schema]:
    """Entries of a list as sections: a text stands for a section with that name."""
    if not isinstance(entries, (list, tuple)):
        raise ConfigError(f"{key} is {entries!r}; expected a list of names or sections.")
    named = [{"name": entry} if isinstance(entry, str) else entry for entry in entries]
    return [load(schema, entry, name=f"{key}[{number}]") for number, entry in enumerate(named)]
