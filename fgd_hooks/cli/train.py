"""``fgd train`` and ``fgd doctor``: they take the same settings."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from ultralytics.utils.checks import check_file

from fgd_hooks.cli.settings import check_settings, split_settings
from fgd_hooks.config import FGDConfig, load_config
from fgd_hooks.errors import ConfigError
from fgd_hooks.integrations.load_model import load_yolo
from fgd_hooks.integrations.ultralytics.callback import FGDCallback
from fgd_hooks.integrations.ultralytics.doctor import diagnose_training
from fgd_hooks.pairing import check_names

REQUIRED = {"teacher": "weights of the teacher", "model": "weights or yaml of the student"}


def train(arguments: argparse.Namespace) -> None:
    """``fgd train``: Ultralytics' own training, with the callback."""
    settings, config = _read(arguments, REQUIRED)
    callback = FGDCallback(settings.pop("teacher"), config=config)
    model = load_yolo(settings.pop("model"))
    if "data" in settings:
        check_data(str(settings["data"]))
    callback.attach(model)
    try:
        model.train(**settings)
    except SyntaxError as error:  # Ultralytics' own word for an unknown key
        raise ConfigError(str(error)) from error


def doctor(arguments: argparse.Namespace) -> int:
    """``fgd doctor``: print what is found; 1 for a red finding, with ``--strict`` for a yellow one, too."""
    settings, config = _read(arguments, {**REQUIRED, "data": "yaml file of the data set"})
    check_names(config)
    check_data(str(settings["data"]))
    model, data = (str(settings.pop(key)) for key in ("model", "data"))
    report = diagnose_training(
        load_yolo(model), teacher=settings.pop("teacher"), data=data, config=config, settings=settings
    )
    Console().print(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False), encoding="utf-8")
    return int(report.status == "red" or (arguments.strict and report.status == "yellow"))


def check_data(data: str) -> None:
    """Refuse a data yaml that neither exists nor is one that Ultralytics brings along."""
    if data.endswith((".yaml", ".yml")) and "://" not in data and not check_file(data, hard=False):
        raise FileNotFoundError(f"The data file {data!r} does not exist, here or among Ultralytics' own data sets.")


def _read(arguments: argparse.Namespace, required: dict[str, str]) -> tuple[dict[str, Any], FGDConfig]:
    """Ultralytics' settings, with teacher and model, and the distillation's configuration."""
    settings, ours = split_settings(arguments.settings)
    config = load_config(settings.pop("config", None), ours)
    if not settings.get("teacher") and config.teachers and all(share.name for share in config.teachers):
        settings["teacher"] = [share.name for share in config.teachers]
    check_settings(settings, required)
    return settings, config
