"""``fgd train`` and ``fgd doctor``: they take the same settings."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from ultralytics.utils.checks import check_file

from fgd_hooks.cli.settings import check_host, check_settings, host_keys, split_settings
from fgd_hooks.config import FGDConfig, load_config
from fgd_hooks.errors import ConfigError, FGDError
from fgd_hooks.evaluation.runs import read_run, weights_of
from fgd_hooks.integrations.load_model import load_yolo
from fgd_hooks.integrations.ultralytics.callback import FGDCallback
from fgd_hooks.integrations.ultralytics.doctor import diagnose_training
from fgd_hooks.integrations.ultralytics.settings import SETTINGS_FILE
from fgd_hooks.pairing import check_names

REQUIRED = {
    "teacher": "weights of the teacher",
    "model": "weights or yaml of the student; with resume=True the run's folder",
    "data": "yaml file of the data set",
}


def train(arguments: argparse.Namespace) -> None:
    """``fgd train``: Ultralytics' own training, with the callback; then what came of it."""
    settings, config = _read(arguments)
    callback = FGDCallback(teacher=settings.pop("teacher"), config=config)
    data, model = settings.get("data"), load_yolo(str(settings.pop("model")))
    if data is not None:
        check_data(str(data))
    if settings.get("resume"):
        _check_resumable(model)
        settings["resume"] = True
    callback.attach(model)
    try:
        model.train(**settings)
    except KeyboardInterrupt:
        folder = getattr(getattr(model, "trainer", None), "save_dir", None)
        if folder is None or not (Path(folder) / "weights" / "last.pt").is_file():
            raise
        raise KeyboardInterrupt(f"to go on: fgd train model={shlex.quote(str(folder))} resume=True") from None
    if (folder := getattr(model.trainer, "save_dir", None)) is not None:
        with contextlib.suppress(FGDError, FileNotFoundError):
            print(_outcome(Path(folder), str(data or model.trainer.args.data)))


def _outcome(folder: Path, data: str) -> str:
    """What a finished training has left: the student's mAP, the files, the next commands."""
    run = read_run(folder)
    points = {"last": run.last, "best": run.best}
    found = [f"{100 * each[1]:.1f} ({name}, epoch {each[0]})" for name, each in points.items() if each]
    place, quoted = shlex.quote(str(folder)), shlex.quote(data)
    return (
        f"The student's mAP50-95 on val: {', '.join(found) or 'not measured'}.\n"
        f"Weights, {SETTINGS_FILE} and results.csv are in {folder}\n"
        f"By class and size:       fgd eval {place} data={quoted}\n"
        f"Beside a run without it: fgd compare {place} OTHER_RUN"
    )


def _check_resumable(model: Any) -> None:
    """Refuse weights of a training that is finished: Ultralytics would begin another one, on other data."""
    saved = getattr(model, "ckpt", None) or {}
    if saved.get("epoch", -1) < 0 or saved.get("optimizer") is None:
        raise ConfigError(
            f"{model.ckpt_path or 'The model'} is of a training that is finished, so there is nothing to resume. To "
            "train longer, begin a new one from these weights: leave resume= out and give teacher=, data= and epochs=."
        )


def doctor(arguments: argparse.Namespace) -> int:
    """``fgd doctor``: print what is found; 1 for a red finding, with ``--strict`` for a yellow one, too."""
    settings, config = _read(arguments)
    check_names(config)
    check_data(str(settings["data"]))
    print("Examining teacher, student and a batch of the data; no run is left behind ...", flush=True)
    model, data = (str(settings.pop(key)) for key in ("model", "data"))
    report = diagnose_training(
        load_yolo(model), teacher=settings.pop("teacher"), data=data, config=config, settings=settings
    )
    Console().print(report if arguments.verbose else report.short())
    if report.status == "red":
        print("Next: mend what is red, and run the same command again.")
    else:
        print(f"Next: fgd train {shlex.join(arguments.settings)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False), encoding="utf-8")
    return int(report.status == "red" or (arguments.strict and report.status == "yellow"))


def check_data(data: str) -> None:
    """Refuse what is no data yaml, and one that neither exists nor is among those that Ultralytics brings along."""
    if data.endswith(".json"):
        raise ConfigError(f"data={data} is an annotation json; a YOLO training takes a data yaml. fgd eval reads both.")
    if data.endswith((".yaml", ".yml")) and "://" not in data and not check_file(data, hard=False):
        raise FileNotFoundError(f"The data file {data!r} does not exist, here or among Ultralytics' own data sets.")


def _read(arguments: argparse.Namespace) -> tuple[dict[str, Any], FGDConfig]:
    """Ultralytics' settings, with teacher and model, and the distillation's configuration."""
    settings, ours = split_settings(arguments.settings)
    known = ["teacher", "model", "config", *host_keys()]
    check_settings(settings, {}, [*known, "fgd.*"])
    check_host(settings)
    resume, config = settings.get("resume"), settings.pop("config", None)
    if isinstance(resume, str):
        settings.setdefault("model", resume)
    required = {key: REQUIRED[key] for key in (("model", "teacher") if resume else REQUIRED)}
    if resume and settings.get("model") is not None:
        file = weights_of(str(settings["model"]))
        settings["model"], begun = str(file), file.resolve().parent.parent / SETTINGS_FILE
        if config is None and begun.is_file():
            config = begun
        if not begun.is_file():
            _check_resumable(load_yolo(str(file)))
    loaded = load_config(config, ours)
    if not settings.get("teacher") and all(loaded.teacher_names):
        settings["teacher"] = loaded.teacher_names if loaded.teachers else loaded.teacher_names[0]
    check_settings(settings, required, known)
    return settings, loaded
