"""Typed configuration: plain dataclasses, read from YAML, from dicts and from ``key=value`` texts.

Reading and merging is OmegaConf's (imported only then); a configuration written in Python needs nothing but this file.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fgd_hooks.registry import suggestion

MAX_TEXT = 64 * 1024  # characters of YAML; a configuration takes one or two thousand
MAX_ALIASES = 20  # each may repeat all that came before it
MAX_DEPTH = 20
MAX_VALUES = 10_000
INHERITED = ("", "neck", "head", "neck+head")


class ConfigError(ValueError):
    """A configuration with an unknown key, a wrong type or an impossible value."""


def _require(holds: bool, key: str, found: object, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{key} is {found!r}; expected {expected}.")


def _one_of(key: str, found: str, known: Sequence[str]) -> None:
    if found not in known:
        raise ConfigError(f"{key} is {found!r}. {suggestion(str(found), known)}")


def _positive(key: str, value: float) -> None:
    _require(math.isfinite(value) and value > 0, key, value, "a finite number above 0")


def _not_negative(key: str, value: float) -> None:
    _require(math.isfinite(value) and value >= 0, key, value, "a finite number, 0 or more")


class _Section:
    """Base of the configuration's dataclasses: types are checked first, then values."""

    def __post_init__(self) -> None:
        prefix = _SECTION_NAMES.get(type(self).__name__, "")
        for name, kind in typing.get_type_hints(type(self)).items():
            if not dataclasses.is_dataclass(kind):
                _check_type(getattr(self, name), kind, prefix + name)
            elif not isinstance(getattr(self, name), typing.cast(type, kind)):
                raise ConfigError(f"{prefix}{name} is a section; found {getattr(self, name)!r}.")
        self._check()

    def _check(self) -> None:
        """Raise ConfigError for an impossible value."""


_SECTION_NAMES = {
    "LossConfig": "loss.",
    "BalanceConfig": "balance.",
    "ScheduleConfig": "schedule.",
    "TeacherConfig": "teacher.",
    "OptimizerConfig": "optimizer.",
}


@dataclass
class LossConfig(_Section):
    """Which loss compares a student level with a teacher level, and its weights.

    Args:
        name: a registered loss ("fgd", "imitation", or one of your own).
        preset: the paper's weights for a kind of detector, for "fgd": two_stage, anchor_based, anchor_free or fcos.
        options: arguments of the loss by name; for "fgd" they replace the preset's
            (temperature, alpha, beta, gamma, lambda_).
        weight: of this loss beside others. Where the balance is measured, it multiplies ``balance.ratio``; otherwise
            the loss.
    """

    name: str = "fgd"
    preset: str = "anchor_based"
    options: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    def _check(self) -> None:
        _positive("loss.weight", self.weight)


@dataclass
class TeacherShare(_Section):
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
        _positive("weight", self.weight)


@dataclass
class BalanceConfig(_Section):
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
        max_change: largest factor by which one measurement may move the scale.
    """

    mode: str = "gradient"
    ratio: float = 1.0
    per_level: bool = True
    momentum: float = 0.9
    interval: int = 10
    min_scale: float = 1e-8
    max_scale: float = 1e8
    max_change: float = 2.0

    def _check(self) -> None:
        _one_of("balance.mode", self.mode, ("gradient", "fixed"))
        _positive("balance.ratio", self.ratio)
        _require(0 <= self.momentum < 1, "balance.momentum", self.momentum, "a number from 0 to below 1")
        _require(self.interval >= 2, "balance.interval", self.interval, "2 or more steps")
        _positive("balance.min_scale", self.min_scale)
        _positive("balance.max_scale", self.max_scale)
        _require(
            self.min_scale <= self.max_scale,
            "balance.min_scale",
            self.min_scale,
            f"at most balance.max_scale ({self.max_scale})",
        )
        _require(self.max_change > 1, "balance.max_change", self.max_change, "a factor above 1")


@dataclass
class ScheduleConfig(_Section):
    """The weight over time (see fgd_hooks/schedule.py).

    Args:
        kind: "constant", "linear" or "cosine" decay from 1 to ``end``.
        warmup_steps: steps over which the weight rises from 0 at the start of the training.
        start_epoch: first epoch that distils; below 1, a fraction of the training.
        stop_epoch: first epoch that no longer distils; up to 1, a fraction of the training (without effect where the
            loop does not say how many epochs there are); null, never.
        end: the factor at the end of a decay.
    """

    kind: str = "constant"
    warmup_steps: int = 0
    start_epoch: float = 0.0
    stop_epoch: float | None = 0.7
    end: float = 0.0

    def _check(self) -> None:
        _one_of("schedule.kind", self.kind, ("constant", "linear", "cosine"))
        _not_negative("schedule.warmup_steps", self.warmup_steps)
        _not_negative("schedule.start_epoch", self.start_epoch)
        if self.stop_epoch is not None:
            _positive("schedule.stop_epoch", self.stop_epoch)
            if (self.start_epoch < 1) == (self.stop_epoch <= 1):
                expected = f"more than schedule.start_epoch ({self.start_epoch})"
                _require(self.stop_epoch > self.start_epoch, "schedule.stop_epoch", self.stop_epoch, expected)
        _require(0 <= self.end <= 1, "schedule.end", self.end, "a number from 0 to 1")


@dataclass
class TeacherConfig(_Section):
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

    dtype: str = "auto"
    fuse: bool = True
    compile: bool = False
    name: str | None = None

    def _check(self) -> None:
        _one_of("teacher.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))


@dataclass
class OptimizerConfig(_Section):
    """The optimiser of adapters and context blocks where an integration owns it (AdamW).

    Args:
        lr: learning rate at the start; it follows the host's schedule.
        weight_decay: AdamW's.
        clip: largest norm of their gradient.
    """

    lr: float = 1e-3
    weight_decay: float = 1e-4
    clip: float = 10.0

    def _check(self) -> None:
        _positive("optimizer.lr", self.lr)
        _not_negative("optimizer.weight_decay", self.weight_decay)
        _positive("optimizer.clip", self.clip)


@dataclass
class FGDConfig(_Section):
    """Everything about one distillation.

    Args:
        weight: of the whole distillation; 0 switches it off, and the run is the stock run.
        every: distil every so many steps; the teacher rests in the others.
        student_taps: where the student's levels are (names, globs); null: the maps that feed its head.
        teacher_taps: the same for the teacher.
        levels: names of the levels to use ("P3", ...) out of those that pair; null: all.
        adapter: a registered adapter, or "auto" (identity where channels match, conv1x1 elsewhere).
        resize: resample the student's map where its size differs from the teacher's; an error otherwise.
        inherit: "neck", "head" or "neck+head": an integration copies these of the teacher's weights into the student
            before a training begins, where their shapes are equal (see fgd_hooks/transfer.py); empty: nothing.
        boxes_from: where the Ultralytics callback takes the boxes of the foreground from: "labels", or, in a segment
            training, "masks": the box around what is seen of each instance.
        losses: several losses at once instead of ``loss``: names or sections like it, as in
            ``[fgd, {name: cwd, weight: 0.5}]``. Each has adapters and scales of its own.
        teachers: settings for each of several teachers, in their order: sections as :class:`TeacherShare`, or names.
        score_taps: for a loss that needs the teacher's class scores: the modules of the teacher that return them, one
            for each of its levels, finest first; null: found by an integration.
        max_bad_steps: this many steps in a row without a finite distillation loss end the training with an error.
        log_interval: steps from one TensorBoard record to the next; 0: none, no pictures either.
        image_interval: epochs from one set of attention pictures in TensorBoard to the next; 0: none.
    """

    weight: float = 1.0
    every: int = 1
    student_taps: list[str] | None = None
    teacher_taps: list[str] | None = None
    levels: list[str] | None = None
    adapter: str = "auto"
    resize: bool = False
    inherit: str = ""
    boxes_from: str = "labels"
    losses: list[Any] = field(default_factory=list)
    teachers: list[Any] = field(default_factory=list)
    score_taps: list[str] | None = None
    max_bad_steps: int = 50
    log_interval: int = 10
    image_interval: int = 10
    loss: LossConfig = field(default_factory=LossConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def _check(self) -> None:
        _not_negative("weight", self.weight)
        _require(self.every >= 1, "every", self.every, "1 or more steps")
        self.losses = _sections(self.losses, LossConfig, "losses")
        self.teachers = _sections(self.teachers, TeacherShare, "teachers")
        if self.losses and self.loss != LossConfig():
            raise ConfigError("Both loss and losses are given; move loss into the list losses.")
        for key in ("student_taps", "teacher_taps", "levels", "score_taps"):
            value = getattr(self, key)
            _require(value is None or len(value) > 0, key, value, "null or a list of at least one")
        _one_of("boxes_from", self.boxes_from, ("labels", "masks"))
        _require(self.inherit in INHERITED, "inherit", self.inherit, "'', 'neck', 'head' or 'neck+head'")
        _require(self.max_bad_steps >= 1, "max_bad_steps", self.max_bad_steps, "1 or more")
        _not_negative("log_interval", self.log_interval)
        _not_negative("image_interval", self.image_interval)

    @property
    def all_losses(self) -> list[LossConfig]:
        """``losses``, or ``loss`` alone."""
        return self.losses or [self.loss]


def _sections(values: list[Any], schema: type, key: str) -> list[Any]:
    """Entries of a list as sections: a text stands for a section with that name."""
    built = []
    for number, value in enumerate(values):
        place = f"{key}[{number}]"
        if isinstance(value, str):
            value = {"name": value}
        if isinstance(value, Mapping):
            _check_keys(value, place, schema)
            try:
                value = _build(schema, value)
            except ConfigError as error:
                raise ConfigError(f"{place}: {error}") from None
        if not isinstance(value, schema):
            raise ConfigError(f"{place} is {value!r}; expected a name or a section.")
        built.append(value)
    return built


def known_keys(schema: type = FGDConfig, prefix: str = "") -> list[str]:
    """All keys in dotted form, ``balance.ratio`` and so on, sections included."""
    keys: list[str] = []
    for name, kind in typing.get_type_hints(schema).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            keys += known_keys(typing.cast(type, kind), f"{prefix}{name}.")
    return keys


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
    for source, values in (_from_config(config), _from_overrides(overrides)):
        _check_extent(values, source)
        _check_keys(values, source)
        _merge(merged, values)
        sources += [source] if values else []
    try:
        return typing.cast(FGDConfig, _build(FGDConfig, merged))
    except ConfigError as error:
        raise ConfigError(f"{', '.join(sources)}: {error}") from None


def config_to_dict(config: FGDConfig) -> dict[str, Any]:
    """The configuration as nested plain values, for YAML and for side files."""
    return dataclasses.asdict(config)


def save_config(config: FGDConfig, path: str | Path) -> None:
    """Write the configuration as YAML; :func:`load_config` reads it back."""
    from omegaconf import OmegaConf

    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.create(config_to_dict(config))), encoding="utf-8")


def _build(schema: type, values: Mapping[str, Any]) -> Any:
    """A dataclass from checked keys; absent ones take their defaults."""
    hints = typing.get_type_hints(schema)
    arguments = {
        key: _build(hints[key], value) if dataclasses.is_dataclass(hints[key]) else copy.deepcopy(value)
        for key, value in values.items()
    }
    return schema(**arguments)


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping):
            section = into.setdefault(key, {})
            if isinstance(section, dict):
                _merge(section, value)
                continue
        into[key] = value


def _from_config(config: FGDConfig | Mapping[str, Any] | str | Path | None) -> tuple[str, dict[str, Any]]:
    if config is None:
        return "defaults", {}
    if isinstance(config, FGDConfig):
        _check_extent(vars(config), "configuration")
        return "configuration", config_to_dict(config)
    if isinstance(config, Mapping):
        return "configuration", dict(config)
    if not isinstance(config, (str, Path)):
        raise ConfigError(f"The configuration is a {type(config).__name__}; expected an FGDConfig, a dict or a file.")
    path = Path(config)
    if not _is_file(path):
        raise FileNotFoundError(f"The configuration file {str(path)!r} does not exist.")
    if path.stat().st_size > 4 * MAX_TEXT:
        raise ConfigError(f"{path} has {path.stat().st_size} bytes; that is no configuration.")
    try:
        values = _parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of a text that is not UTF-8
        raise ConfigError(f"{path} is no valid YAML: {error}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; expected keys and values.")
    return str(path), values


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a zero character: no file has such a name
        return False


def _parse_yaml(text: str) -> Any:
    """Plain values from YAML as OmegaConf reads it: 1e-3 is a number, a key that is given twice is an error.

    Raises:
        ValueError: the text is no valid YAML, or unreasonably long or deep.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if len(text) > MAX_TEXT:
        raise ValueError(f"it has {len(text)} characters; at most {MAX_TEXT} are read")
    try:
        aliases = depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            aliases += isinstance(event, yaml.AliasEvent)
            # an alias that repeats aliases multiplies: a short text could fill the memory
            if depth > MAX_DEPTH or aliases > MAX_ALIASES:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep, or has more than {MAX_ALIASES} aliases")
        # a list with the text as its one element, so that plain values are read as well
        indented = "".join(f"  {line}\n" for line in text.splitlines()) or "  null\n"
        return OmegaConf.to_container(OmegaConf.create(f"-\n{indented}"), resolve=False)[0]  # type: ignore[index]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _from_overrides(overrides: Sequence[str] | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    pairs = list(overrides.items()) if isinstance(overrides, Mapping) else [_key_value(text) for text in overrides]
    nested: dict[str, Any] = {}
    for key, value in pairs:
        *sections, last = str(key).split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"overrides: {key} and another override give the same key twice.")
        if last in place and not isinstance(overrides, Mapping):
            raise ConfigError(f"overrides: {key} is given twice.")
        if isinstance(value, Mapping) and isinstance(place.get(last), dict):
            place[last].update(value)
        else:
            place[last] = dict(value) if isinstance(value, Mapping) else value
    return "overrides", nested


def _key_value(text: str) -> tuple[str, Any]:
    if not isinstance(text, str):
        raise ConfigError(f"An override is a {type(text).__name__}; expected a text key=value.")
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"The override {text!r} cannot be read; expected key=value.")
    try:
        return key, None if value.lower() == "none" else _parse_yaml(value)
    except ValueError as error:
        raise ConfigError(f"The override {text!r} cannot be read: {error}") from error


def _check_extent(values: Any, source: str, left: list[int] | None = None, depth: int = 0) -> None:
    """Refuse what no configuration holds: endless nesting, thousands of values, keys that are no text, huge numbers.

    Args:
        values: anything.
        source: where it is from, for the message.
        left: one number: how many more values there may be.
        depth: how many containers ``values`` is in.
    """
    left = [MAX_VALUES] if left is None else left
    left[0] -= 1
    if depth > MAX_DEPTH or left[0] < 0:
        raise ConfigError(f"{source}: nested more than {MAX_DEPTH} deep, or more than {MAX_VALUES} values.")
    if isinstance(values, int) and not -(2**63) <= values < 2**63:
        raise ConfigError(f"{source}: a whole number of {values.bit_length()} bits; at most 64 are possible.")
    if dataclasses.is_dataclass(values):
        values = vars(values)
    if isinstance(values, Mapping):
        for key in values:
            if not isinstance(key, str):
                raise ConfigError(f"{source}: a key is a {type(key).__name__}; expected a text. Put it into quotes.")
        values = list(values.values())
    if isinstance(values, (list, tuple)):
        for value in values:
            _check_extent(value, source, left, depth + 1)


def _check_keys(
    values: Mapping[str, Any], source: str, schema: type = FGDConfig, prefix: str = "", root: type | None = None
) -> None:
    root = root or schema
    hints = typing.get_type_hints(schema)
    for key, value in values.items():
        if key not in hints:
            known = known_keys(root)
            raise ConfigError(f"{source}: there is no key {prefix}{key!s}. {suggestion(prefix + str(key), known)}")
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{source}: {prefix}{key} is a section; found {value!r}.")
            _check_keys(value, source, typing.cast(type, kind), f"{prefix}{key}.", root)


def _check_type(value: Any, kind: Any, key: str) -> None:
    if not _fits(value, kind):
        expected = str(kind) if isinstance(kind, types.UnionType) else getattr(kind, "__name__", str(kind))
        raise ConfigError(f"{key} is {value!r}; expected {expected}.")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a plain value has the annotated type (no text for a number, no number for a text, no bool for either)."""
    if kind is Any:
        return True
    if isinstance(kind, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(kind))
    origin = typing.get_origin(kind) or kind
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is list:
        item = typing.get_args(kind)[0]
        return isinstance(value, (list, tuple)) and all(_fits(each, item) for each in value)
    if origin is types.NoneType:
        return value is None
    return isinstance(value, origin)
