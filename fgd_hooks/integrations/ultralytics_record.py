"""What an Ultralytics training leaves behind about its distillation: its settings, and its row among the runs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fgd_hooks.config import ConfigError, FGDConfig, TeacherShare, config_to_dict, load_config, save_config
from fgd_hooks.monitor import BEST_MAP, EPOCH_MAP, FINAL_MAP, FINAL_MAP50, hyper_parameters, write_hyper_parameters
from fgd_hooks.runfolder import MAP, MAP50, SHOWN_KEYS, flat

logger = logging.getLogger("ultralytics")

SETTINGS_FILE = "fgd.yaml"
HOST_SETTINGS = ("model", "data", "epochs", "batch", "imgsz", "optimizer", "lr0", "seed")


def named_config(config: FGDConfig, teacher: Any) -> FGDConfig:
    """The configuration with the teacher's name in it, or those of several: the file, else the class."""
    config = copy.deepcopy(config)
    if isinstance(teacher, (list, tuple)):
        shares = config.teachers or [TeacherShare() for _ in teacher]
        named = [dataclasses.replace(share, name=_name(one)) for share, one in zip(shares, teacher, strict=False)]
        return dataclasses.replace(config, teachers=named)
    config.teacher.name = _name(teacher)
    return config


def _name(teacher: Any) -> str:
    path = teacher if isinstance(teacher, (str, Path)) else getattr(teacher, "ckpt_path", None)
    return str(path) if path else type(teacher).__name__


def save_settings(config: FGDConfig, folder: Path) -> None:
    """Write the settings of the distillation beside Ultralytics' ``args.yaml``; ``config=fgd.yaml`` repeats them."""
    try:
        save_config(config, folder / SETTINGS_FILE)
    except OSError as error:
        logger.warning("FGD: %s could not be written (%s); the training goes on.", SETTINGS_FILE, error)


def changed_settings(config: FGDConfig, folder: Path) -> dict[str, tuple[Any, Any]]:
    """What differs from the settings that a run was begun with: dotted key, then the value there and the value now.

    Empty where there is no record, or one that cannot be read any more.
    """
    file = folder / SETTINGS_FILE
    try:
        before = flat(config_to_dict(load_config(file)))
    except (FileNotFoundError, ConfigError):
        return {}
    now = flat(config_to_dict(config))
    changed = {key: (before.get(key), now[key]) for key in now if before.get(key) != now[key] and key not in SHOWN_KEYS}
    teachers = [Path(str(name)).name for name in changed.get("fgd.teacher.name", ())]
    if teachers and teachers[0] == teachers[1]:
        del changed["fgd.teacher.name"]  # the same file by another path
    return changed


def keep_settings(folder: Path) -> Path:
    """Keep the settings that a run was begun with beside those that it goes on with; returns the file."""
    kept = folder / "fgd-begun.yaml"
    if not kept.is_file():
        with contextlib.suppress(OSError):
            shutil.copyfile(folder / SETTINGS_FILE, kept)
    return kept


def write_epoch(writer: Any, trainer: Any) -> None:
    """Write the mAP of a validated epoch under a name that TensorBoard's page of charts can draw."""
    value = (trainer.metrics or {}).get(MAP)
    if value is not None and (trainer.args.val or trainer.epoch + 1 >= trainer.epochs):
        writer.add_scalar(EPOCH_MAP, float(value), trainer.epoch + 1)


def write_run(writer: Any, trainer: Any, config: FGDConfig, last: Mapping[str, float]) -> None:
    """Write the run's row of TensorBoard's table of hyper-parameters.

    Args:
        writer: a ``SummaryWriter``.
        trainer: at the end of its training, when its ``metrics`` are those of ``best.pt``.
        config: of the distillation.
        last: Ultralytics' metrics of the last epoch.
    """
    host = {key: getattr(trainer.args, key) for key in HOST_SETTINGS}
    host["epochs"] = trainer.epochs
    plain = {key: value if isinstance(value, (int, float)) else Path(str(value)).name for key, value in host.items()}
    best = (trainer.metrics or {}).get(MAP)
    found = {FINAL_MAP: last.get(MAP), FINAL_MAP50: last.get(MAP50), BEST_MAP: best}
    metrics = {tag: float(value) for tag, value in found.items() if value is not None}
    write_hyper_parameters(writer, hyper_parameters(config, **plain), metrics, trainer.epochs)
