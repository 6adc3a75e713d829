"""What is taught to whom: each level of each teacher under each loss, planned from the configuration."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fgd_hooks.adapters import list_adapters
from fgd_hooks.config import FGDConfig, LossConfig, TeacherShare
from fgd_hooks.errors import ConfigError, PairingError, TapError
from fgd_hooks.losses.base import LOSSES, FeatureLoss, create_loss, list_losses
from fgd_hooks.losses.fgd import PRESETS
from fgd_hooks.taps.levels import Level, common_size, find_levels
from fgd_hooks.taps.tap import Tap, expand_taps
from fgd_hooks.utils.registry import suggestion

logger = logging.getLogger("fgd_hooks")


@dataclass(frozen=True)
class LevelPair:
    """A student's level and the teacher's level that teaches it."""

    name: str
    student: Level
    teacher: Level


@dataclass(frozen=True)
class DistillationPair(LevelPair):
    """One level of one teacher, taught to the student under one loss; with an adapter and a scale of its own.

    Args:
        name: "P3"; with several losses or teachers "P3-cwd", "P3-teacher2", "P3-teacher2-cwd".
        number: of the teacher, from 0.
        loss: the loss's configuration.
        weight: the loss's weight times the teacher's.
        group: number of this combination of teacher and loss.
        scores: where the teacher's class scores of this level are captured, for a loss that needs them.
    """

    number: int = 0
    loss: LossConfig = field(default_factory=LossConfig)
    weight: float = 1.0
    group: int = 0
    scores: Tap | None = None


@dataclass(frozen=True)
class FoundLevels:
    """All levels of the student that one teacher may teach, and that teacher's, finest first, and those chosen."""

    student: list[Level]
    teacher: list[Level]
    chosen: list[str] | None


def plan_pairs(
    student: nn.Module,
    teachers: Sequence[nn.Module],
    config: FGDConfig,
    example: Any = None,
    teacher_inputs: Any = None,
) -> tuple[list[DistillationPair], list[FoundLevels]]:
    """Find the levels of all models by probes and pair them: teacher by teacher, finest level first, loss by loss.

    Args:
        student: the model that learns.
        teachers: the models that teach.
        config: of the distillation.
        example: what the models are called with in the probe, see :func:`fgd_hooks.taps.levels.find_levels`.
        teacher_inputs: the same for the teachers; None: ``example``.

    Raises:
        ConfigError: ``levels`` names one that does not pair, ``teachers`` has another number of entries than there are
            teachers, scores are needed and not where ``score_taps`` says, or two maps differ in size and ``resize`` is
            off.
        TapError, PairingError: as :func:`find_levels` and :func:`pair_levels`.
    """
    size = common_size([student, *teachers]) if example is None else None
    shares: list[TeacherShare] = config.teachers or [TeacherShare() for _ in teachers]
    if len(shares) != len(teachers):
        raise ConfigError(f"teachers has {len(shares)} entries, but there are {len(teachers)} teachers.")
    losses = config.all_losses
    names = [loss.name for loss in losses]
    if len(set(names)) < len(names):
        names = [f"{name}{number + 1}" if names.count(name) > 1 else name for number, name in enumerate(names)]
    planned: list[DistillationPair] = []
    found: list[FoundLevels] = []
    of_student: dict[str, list[Level]] = {}
    for number, (teacher, share) in enumerate(zip(teachers, shares, strict=True)):
        taps = share.student_taps or config.student_taps
        for model, named, part in ((student, taps, "student"), (teacher, share.taps or config.teacher_taps, "teacher")):
            if named is None:
                _refuse_own_transform(model, part)
        if str(taps) not in of_student:
            of_student[str(taps)] = find_levels(student, taps, example=example, role="student", size=size)
        mine = of_student[str(taps)]
        several = f"teacher{number + 1}" if len(teachers) > 1 else ""
        role = f"teacher {number + 1}" if several else "teacher"
        inputs = example if teacher_inputs is None else teacher_inputs
        theirs = find_levels(
            teacher, share.taps or config.teacher_taps, example=inputs, role=role, size=size or mine[0].canvas
        )
        chosen = share.levels or config.levels
        found.append(FoundLevels(mine, theirs, chosen))
        scores = _score_taps(teacher, theirs, config)
        for pair in _chosen(pair_levels(mine, teacher=theirs), chosen, config.resize):
            for position, (name, loss) in enumerate(zip(names, losses, strict=True)):
                planned.append(
                    DistillationPair(
                        "-".join(filter(None, (pair.name, several, name if len(losses) > 1 else ""))),
                        pair.student,
                        pair.teacher,
                        number=number,
                        loss=loss,
                        weight=loss.weight * share.weight,
                        group=number * len(losses) + position,
                        scores=scores.get(pair.teacher.tap) if needs_scores(loss.name) else None,
                    )
                )
    return planned, found


def needs_scores(name: str) -> bool:
    """Whether the loss registered as ``name`` compares with the teacher's class scores as well."""
    return bool(getattr(LOSSES.get(name), "needs_scores", False))


def _score_taps(teacher: nn.Module, levels: Sequence[Level], config: FGDConfig) -> dict[Tap, Tap]:
    """For each level of a teacher, the tap of its class scores; empty where no loss needs them."""
    wanting = [loss.name for loss in config.all_losses if needs_scores(loss.name)]
    if not wanting:
        return {}
    if config.score_taps is None:
        raise ConfigError(
            f"The loss {wanting[0]!r} weights cells by the teacher's class scores, and where a "
            f"{type(teacher).__name__} has those is not known. Name the modules that return them as score_taps=[...], "
            "one for each level of the teacher, finest first."
        )
    taps = expand_taps(teacher, config.score_taps)
    if len(taps) != len(levels):
        raise ConfigError(
            f"score_taps names {len(taps)} modules, but the teacher has {len(levels)} levels: "
            f"{', '.join(str(level.tap) for level in levels)}. Name one for each, finest first."
        )
    return {level.tap: tap for level, tap in zip(levels, taps, strict=True)}


def _chosen(pairs: Sequence[LevelPair], chosen: Sequence[str] | None, resize: bool) -> list[LevelPair]:
    """The pairs of the levels that are named (None: all), with maps of one size unless they are resized."""
    names = [pair.name for pair in pairs]
    for wanted in chosen or []:
        if wanted not in names:
            raise ConfigError(f"levels names {wanted!r}, but the levels that pair are {', '.join(names)}.")
    pairs = [pair for pair in pairs if chosen is None or pair.name in chosen]
    for pair in pairs:
        same_images = pair.student.canvas == pair.teacher.canvas  # each was probed with a size that it takes
        if same_images and pair.student.size != pair.teacher.size and not resize:
            raise ConfigError(
                f"At level {pair.name} the student's map ({pair.student.tap}) has {pair.student.size} cells and the "
                f"teacher's ({pair.teacher.tap}) {pair.teacher.size} for the same input. Set resize=true to resample "
                "the student's, or name other taps."
            )
    return pairs


def signature(pair: LevelPair) -> str:
    """What must be equal for a level's state to fit: name, stride and channels."""
    sides = (f"stride {level.stride}, {level.channels} channels" for level in (pair.student, pair.teacher))
    return f"{pair.name}: {' / '.join(sides)}"


def check_names(config: FGDConfig) -> None:
    """Refuse a configuration that names an adapter, a loss or a preset that does not exist.

    Raises:
        ConfigError: names the nearest one.
    """
    adapters, losses, presets = ["auto", *list_adapters()], list_losses(), list(PRESETS)
    checked = [("adapter", config.adapter, adapters)]
    for number, loss in enumerate(config.all_losses):
        key = f"losses[{number}]" if config.losses else "loss"
        checked += [(f"{key}.name", loss.name, losses), (f"{key}.preset", loss.preset, presets)]
    for key, name, known in checked:
        if name not in known:
            raise ConfigError(f"{key} is {name!r}. {suggestion(name, known)}")


def build_loss(config: LossConfig, channels: int) -> FeatureLoss:
    """The loss of one level.

    Raises:
        ConfigError: an option does not exist, or a value is impossible.
    """
    options = dict(config.options)
    if getattr(LOSSES.get(config.name), "takes_preset", False):
        options = {**PRESETS[config.preset], **options}
    try:
        return create_loss(config.name, channels=channels, **options)
    except TypeError as error:
        raise ConfigError(f"loss.options do not fit the loss {config.name!r}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"loss.options: {error}") from error


def pair_levels(student: Sequence[Level], *, teacher: Sequence[Level]) -> list[LevelPair]:
    """Pair levels of equal stride, finest first; levels of one model alone are left out, and that is logged.

    Several levels of one stride (say, a backbone's and a neck's) pair in their order.

    Raises:
        PairingError: no stride is common; the message prints both pyramids.
    """
    pairs: list[LevelPair] = []
    for stride in sorted({level.stride for level in student}):
        mine, theirs = ([level for level in levels if level.stride == stride] for levels in (student, teacher))
        for number, (one, other) in enumerate(zip(mine, theirs, strict=False)):
            pairs.append(LevelPair(one.name if number == 0 else f"{one.name}_{number + 1}", one, other))
    if not pairs:
        pyramids = [
            "\n".join(
                f"  {each.name:<4} stride {each.stride:<4} {each.channels:>5} channels  {each.tap}" for each in levels
            )
            for levels in (student, teacher)
        ]
        raise PairingError(
            "Student and teacher have no feature level of the same stride.\n"
            f"Student:\n{pyramids[0]}\nTeacher:\n{pyramids[1]}\n"
            "Choose a teacher with a common stride, or name taps whose strides match."
        )
    used = [level for pair in pairs for level in (pair.student, pair.teacher)]
    for role, levels in (("student", student), ("teacher", teacher)):
        left_out = [f"{level.name} ({level.tap})" for level in levels if not any(level is each for each in used)]
        if left_out:
            logger.warning("Levels of the %s without a partner are not distilled: %s", role, ", ".join(left_out))
    return pairs


def _refuse_own_transform(model: nn.Module, role: str) -> None:
    if type(getattr(model, "transform", None)).__name__ == "GeneralizedRCNNTransform" and "__call__" not in vars(
        type(model)
    ):
        raise TapError(
            f"The {role} ({type(model).__name__}) is a detector of torchvision, which resizes, normalises and pads its "
            "images itself, so boxes and maps do not share the canvas of what goes in. Use "
            "fgd_hooks.integrations.torchvision.TorchvisionDistiller; beside a model of another kind "
            "give OnBatch(detector) of that module in its place (docs/torchvision.md)."
        )
