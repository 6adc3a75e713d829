"""Typed configuration: plain dataclasses, read from YAML, from dicts and from ``key=value`` texts.

Reading and merging is OmegaConf's (imported only then); a configuration written in Python needs nothing but this file.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fgd_hooks.errors import ConfigError
from fgd_hooks.utils.structured_config import (
    Section,
    build,
    check_extent,
    check_keys,
    merge,
    nested,
    not_negative,
    one_of,
    positive,
    read_yaml,
    require,
    sections,
)

__all__ = [
    "BalanceConfig",
    "ConfigError",
    "FGDConfig",
    "LossConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "TeacherConfig",
    "TeacherShare",
    "config_to_dict",
    "load_config",
    "save_config",
]

INHERITED = ("auto", "channels", "fitted", "neck", "head", "neck+head", "")


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
    weight: float = 1.0

    def _check(self) -> None:
        positive("loss.weight", self.weight)


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
    weight: float = 1.0
    taps: list[str] | None = None
    student_taps: list[str] | None = None
    levels: list[str] | None = None

    def _check(self) -> None:
        positive("weight", self.weight)


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

    mode: str = "gradient"
    ratio: float = 1.0
    per_level: bool = True
    momentum: float = 0.5
    interval: int = 10
    min_scale: float = 1e-8
    max_scale: float = 1e8
    max_change: float = 2.0
    image_limit: float | None = 2.0

    def _check(self) -> None:
        one_of("balance.mode", self.mode, ("gradient", "fixed"))
        positive("balance.ratio", self.ratio)
        require(0 <= self.momentum < 1, "balance.momentum", self.momentum, "a number from 0 to below 1")
        require(self.interval >= 2, "balance.interval", self.interval, "2 or more steps")
        positive("balance.min_scale", self.min_scale)
        positive("balance.max_scale", self.max_scale)
        require(
            self.min_scale <= self.max_scale,
            "balance.min_scale",
            self.min_scale,
            f"at most balance.max_scale ({self.max_scale})",
        )
        require(self.max_change > 1, "balance.max_change", self.max_change, "a factor above 1")
        if self.image_limit is not None:
            require(self.image_limit >= 1, "balance.image_limit", self.image_limit, "1 or more, or null")


@dataclass
class ScheduleConfig(Section):
    """The weight over time (see fgd_hooks/schedule.py).

    Args:
        kind: "constant", "linear" or "cosine" decay from 1 to ``end``.
        warmup_steps: steps over which the weight rises from 0 at the start of the training.
        start_epoch: first epoch that distils; below 1, a fraction of the training.
        stop_epoch: first epoch that no longer distils; up to 1, a fraction of the training (without effect where the
            loop does not say how many epochs there are); null, never.
        end: the factor at the end of a decay.
    """

    prefix = "schedule."

    kind: str = "constant"
    warmup_steps: int = 0
    start_epoch: float = 0.0
    stop_epoch: float | None = 0.35
    end: float = 0.0

    def _check(self) -> None:
        one_of("schedule.kind", self.kind, ("constant", "linear", "cosine"))
        not_negative("schedule.warmup_steps", self.warmup_steps)
        not_negative("schedule.start_epoch", self.start_epoch)
        if self.stop_epoch is not None:
            positive("schedule.stop_epoch", self.stop_epoch)
            if (self.start_epoch < 1) == (self.stop_epoch <= 1):
                expected = f"more than schedule.start_epoch ({self.start_epoch})"
                require(self.stop_epoch > self.start_epoch, "schedule.stop_epoch", self.stop_epoch, expected)
        require(0 <= self.end <= 1, "schedule.end", self.end, "a number from 0 to 1")


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

    dtype: str = "auto"
    fuse: bool = True
    compile: bool = False
    name: str | None = None

    def _check(self) -> None:
        one_of("teacher.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))


@dataclass
class OptimizerConfig(Section):
    """The optimiser of adapters and context blocks where an integration owns it (AdamW).

    Args:
        lr: learning rate at the start; it follows the host's schedule.
        weight_decay: AdamW's.
        clip: largest norm of their gradient.
    """

    prefix = "optimizer."

    lr: float = 1e-3
    weight_decay: float = 1e-4
    clip: float = 10.0

    def _check(self) -> None:
        positive("optimizer.lr", self.lr)
        not_negative("optimizer.weight_decay", self.weight_decay)
        positive("optimizer.clip", self.clip)


@dataclass
class FGDConfig(Section):
    """Everything about one distillation.

    Args:
        weight: of the whole distillation; 0 switches it off, and the run is the stock run (but for an ``inherit`` other
            than "auto").
        every: distil every so many steps; the teacher rests in the others.
        student_taps: where the student's levels are (names, globs); null: the maps that feed its head.
        teacher_taps: the same for the teacher.
        levels: names of the levels to use ("P3", ...) out of those that pair; null: all.
        adapter: a registered adapter, or "auto" (identity where channels match, fitted elsewhere).
        resize: resample the student's map where its size differs from the teacher's; an error otherwise.
        inherit: what an integration copies of the teacher's weights into the student before a training begins.
            "channels": evenly spaced channels of every layer, for a student of the teacher's architecture that is
            narrower (weight selection); "fitted": the same, and then each convolution is fitted to what the
            teacher's computes on some training images (reconstruction); "auto": as "fitted", if the
            student begins from random weights and nine tenths of them are replaced so; "neck", "head" or "neck+head":
            these, where their shapes are equal (see fgd_hooks/initialization/inherit.py); null or empty: nothing.
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

    weight: float = 1.0
    every: int = 1
    student_taps: list[str] | None = None
    teacher_taps: list[str] | None = None
    levels: list[str] | None = None
    adapter: str = "auto"
    resize: bool = False
    inherit: str | None = "auto"
    boxes_from: str = "labels"
    losses: list[Any] = field(default_factory=list)
    teachers: list[Any] = field(default_factory=list)
    score_taps: list[str] | None = None
    max_bad_steps: int = 50
    log_interval: int = 10
    image_interval: int | None = None
    loss: LossConfig = field(default_factory=LossConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def _check(self) -> None:
        not_negative("weight", self.weight)
        require(self.every >= 1, "every", self.every, "1 or more steps")
        self.losses = sections(self.losses, LossConfig, "losses")
        self.teachers = sections(self.teachers, TeacherShare, "teachers")
        if self.losses and self.loss != LossConfig():
            raise ConfigError("Both loss and losses are given; move loss into the list losses.")
        for key in ("student_taps", "teacher_taps", "levels", "score_taps"):
            value = getattr(self, key)
            require(value is None or len(value) > 0, key, value, "null or a list of at least one")
        one_of("boxes_from", self.boxes_from, ("labels", "masks"))
        expected = ", ".join(repr(each) for each in INHERITED)
        require(
            self.inherit is None or self.inherit in INHERITED, "inherit", self.inherit, f"null or one of {expected}"
        )
        require(self.max_bad_steps >= 1, "max_bad_steps", self.max_bad_steps, "1 or more")
        not_negative("log_interval", self.log_interval)
        if self.image_interval is not None:
            not_negative("image_interval", self.image_interval)

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
    def teacher_names(self) -> list[str | None]:
        """What each teacher was loaded from, where that is noted."""
        return [share.name for share in self.teachers] or [self.teacher.name]


def load_config(
    config: FGDConfig | Mapping[str, Any] | str | Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
) -> FGDConfig:
    """Build a checked configuration.

    Args:
        config: a configuration, a (nested) dict, a YAML file, or None for the defaults.
        overrides: ``["balance.ratio=1", ...]`` or ``{"balance.ratio": 1, ...}``; they win.

    Raises:
        FileNotFoundError: the YAML file does not exist.
        ConfigError: an unknown key, a wrong type or an impossible value; the message names the key, the place it came
            from and the nearest known key.
    """
    merged: dict[str, Any] = {}
    sources = []
    for source, given in (_from_config(config), ("overrides", overrides)):
        check_extent(given, source)
        values = nested(given)
        check_extent(values, source)  # dots are sections, too
        check_keys(values, source, FGDConfig)
        merge(merged, values)
        sources += [source] if values else []
    try:
        return typing.cast(FGDConfig, build(FGDConfig, merged))
    except ConfigError as error:
        raise ConfigError(f"{', '.join(sources)}: {error}") from None


def config_to_dict(config: FGDConfig) -> dict[str, Any]:
    """The configuration as nested plain values, for YAML and for side files."""
    return dataclasses.asdict(config)


def save_config(config: FGDConfig, path: str | Path) -> None:
    """Write the configuration as YAML; :func:`load_config` reads it back."""
    from omegaconf import OmegaConf

    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.create(config_to_dict(config))), encoding="utf-8")


def _from_config(config: FGDConfig | Mapping[str, Any] | str | Path | None) -> tuple[str, dict[str, Any]]:
    if config is None:
        return "defaults", {}
    if isinstance(config, FGDConfig):
        check_extent(vars(config), "configuration")
        return "configuration", config_to_dict(config)
    if isinstance(config, Mapping):
        return "configuration", dict(config)
    if not isinstance(config, (str, Path)):
        raise ConfigError(f"The configuration is a {type(config).__name__}; expected an FGDConfig, a dict or a file.")
    return str(config), read_yaml(Path(config))
