"""The settings of a distillation in an Ultralytics training: keywords of the callback, and ``fgd.yaml`` of the run."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from fgd_hooks.config import FGDConfig, TeacherShare, config_to_dict, load_config, save_config
from fgd_hooks.errors import ConfigError
from fgd_hooks.evaluation.runs import SHOWN_KEYS, flat
from fgd_hooks.integrations.ultralytics.teacher import as_list, name_of

logger = logging.getLogger("ultralytics")  # the host's own console and log file

SETTINGS_FILE, BEGUN_FILE = "fgd.yaml", "fgd-begun.yaml"


class FGDSettings(TypedDict, total=False):
    """Keywords of the callback: the fields of :class:`~fgd_hooks.config.FGDConfig`, sections as mappings.

    Without its section ``teacher``, since that keyword is the teacher itself; ``overrides`` reach it.
    """

    weight: float
    interval: int
    student_taps: list[str] | None
    teacher_taps: list[str] | None
    levels: list[str] | None
    adapter: str
    resize: bool
    inherit: str | None
    boxes_from: str
    losses: list[Any]
    teachers: list[Any]
    score_taps: list[str] | None
    max_bad_steps: int
    log_interval: int
    image_interval: int | None
    loss: Mapping[str, Any]
    balance: Mapping[str, Any]
    schedule: Mapping[str, Any]
    optimizer: Mapping[str, Any]


def named_config(config: FGDConfig, teacher: Any) -> FGDConfig:
    """The configuration with the teacher's name in it, or those of several: the file, else the class."""
    names = [name_of(one) for one in as_list(teacher)]
    if not isinstance(teacher, (list, tuple)):
        return dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, name=names[0]))
    shares = config.teachers or [TeacherShare() for _ in names]
    named = [dataclasses.replace(share, name=name) for share, name in zip(shares, names, strict=False)]
    return dataclasses.replace(config, teachers=named)


def differences(one: FGDConfig, other: FGDConfig) -> dict[str, tuple[Any, Any]]:
    """The settings that differ: dotted key, then the value in ``one`` and the value in ``other``."""
    before, now = (flat(config_to_dict(config), prefix="") for config in (one, other))
    keys = dict.fromkeys([*now, *before])
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def record_settings(config: FGDConfig, folder: Path, *, resumed: bool) -> None:
    """Write the settings beside Ultralytics' ``args.yaml``; ``config=fgd.yaml`` repeats them.

    In a resumed training first say with which other settings it was begun, and keep those in ``fgd-begun.yaml``.
    """
    file, kept = folder / SETTINGS_FILE, folder / BEGUN_FILE
    if resumed and (changed := changed_settings(config, file)):
        if not kept.is_file():
            with contextlib.suppress(OSError):
                shutil.copyfile(file, kept)
        texts = ", ".join(f"fgd.{key}={was} (now {now})" for key, (was, now) in changed.items())
        message = "FGD: this training was begun with %s. To go on as it was begun, resume it with config=%s."
        logger.warning(message, texts, kept)
    try:
        save_config(config, file)
    except OSError as error:
        logger.warning("FGD: %s could not be written (%s); the training goes on.", SETTINGS_FILE, error)


def changed_settings(config: FGDConfig, file: Path) -> dict[str, tuple[Any, Any]]:
    """What differs from the settings that a run was begun with; empty where they cannot be read any more."""
    try:
        changed = differences(load_config(file), config)
    except (FileNotFoundError, ConfigError):
        return {}
    was, now = (Path(str(name)).name for name in changed.get("teacher.name", ("", "")))
    same_file = {"teacher.name"} if was == now else set()  # by another path
    shown = {key.removeprefix("fgd.") for key in SHOWN_KEYS}
    return {key: pair for key, pair in changed.items() if key not in same_file | shown}
