"""``fgd eval`` and ``fgd compare``: measured numbers as tables and files."""

from __future__ import annotations

import argparse
import inspect
import json

from rich.console import Console

from fgd_hooks.cli.settings import check_host, check_settings, check_types, split_settings
from fgd_hooks.errors import ConfigError
from fgd_hooks.evaluation.compare import compare
from fgd_hooks.evaluation.evaluate import evaluate


def eval_command(arguments: argparse.Namespace) -> None:
    """``fgd eval``: COCO metrics of one model."""
    settings, ours = split_settings(arguments.settings)
    if ours:
        raise ConfigError(f"fgd.{ours[0]} is a setting of the distillation, and there is none in an evaluation.")
    known = [name for name in inspect.signature(evaluate).parameters if name != "model"]
    required = {"data": "a data yaml (YOLO format) or an annotation json (COCO format)"}
    check_settings(settings, required, known)
    settings["data"] = str(settings["data"])
    check_host({key: value for key, value in settings.items() if value is not None})
    check_types({key: value for key, value in settings.items() if key != "device"}, evaluate)
    result = evaluate(arguments.model, **settings)
    Console().print(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result.to_dict(), indent=1), encoding="utf-8")


def compare_command(arguments: argparse.Namespace) -> None:
    """``fgd compare``: several runs side by side."""
    measured = {key: getattr(arguments, key) for key in ("data", "split", "weights", "device")}
    result = compare(arguments.folders, **measured)
    if arguments.markdown:
        print(result.markdown())
    else:
        Console().print(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result.to_dict(), indent=1), encoding="utf-8")
        print(f"All figures: {arguments.json}")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        result.draw(arguments.out / "curves.png")
        print(f"Curves: {arguments.out / 'curves.png'}")
