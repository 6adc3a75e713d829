"""The ``fgd`` command: train, doctor, levels, eval, compare, quickstart, study."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fgd_hooks.cli.levels import levels_command
from fgd_hooks.cli.study import add_parser
from fgd_hooks.config import FGDConfig, load_config
from fgd_hooks.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelNameError,
    NonFiniteError,
    PairingError,
    QuickstartError,
    RunError,
    StudyError,
    TapError,
    TaskError,
    TeacherError,
    UnknownNameError,
    VersionError,
)
from fgd_hooks.integrations.load_model import load_yolo
from fgd_hooks.integrations.ultralytics.compat import NO_TEXT_ENCODER
from fgd_hooks.utils.registry import suggestion

USER_ERRORS = (
    ConfigError,
    DataError,
    FileNotFoundError,
    ModelNameError,
    NonFiniteError,
    PairingError,
    QuickstartError,
    RunError,
    CheckpointError,
    StudyError,
    TapError,
    TaskError,
    TeacherError,
    UnknownNameError,
    VersionError,
)


TRAIN_EPILOG = """\
example:
  fgd train teacher=yolo26s.pt model=yolo26n.pt data=coco8.yaml epochs=100 imgsz=640 fgd.balance.ratio=0.5

keys:
  teacher=   weights of the teacher, or several, teacher=[a.pt,b.pt] (required, unless fgd.teachers names them)
  model=     weights or yaml of the student; with resume=True the last.pt to go on from (required)
  config=    YAML file with the settings of the distillation
  fgd.*=     single settings of the distillation; they win over config=
  all other keys go to Ultralytics' model.train() unchanged
"""


DOCTOR_EPILOG = """\
example:
  fgd doctor teacher=yolo26s.pt model=yolo26n.pt data=coco8.yaml imgsz=640

keys: those of fgd train, with data= required as well. Nothing is trained, and no run is left behind.

exit code: 0 no red finding (with --strict: all green), 1 otherwise, 2 a mistake on the command line or a missing file
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for a mistake of the user's, with one clear line)."""
    parser = argparse.ArgumentParser(prog="fgd", description="Focal and Global Distillation for object detectors.")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser(
        "train",
        help="train a YOLO student with a teacher",
        epilog=TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("settings", nargs="*", metavar="key=value")
    train.set_defaults(run=_train)

    doctor = commands.add_parser(
        "doctor",
        help="check a distillation before the training: takes what train takes",
        epilog=DOCTOR_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument("settings", nargs="*", metavar="key=value")
    doctor.add_argument("--strict", action="store_true", help="exit code 1 for yellow findings as well")
    doctor.add_argument("--json", type=Path, help="file to write the findings to")
    doctor.set_defaults(run=_doctor)

    levels = commands.add_parser("levels", help="show a model's feature levels, and how a teacher's pair with them")
    levels.add_argument(
        "model",
        help="the student: YOLO weights or yaml file, torchvision:retinanet_resnet50_fpn, timm:resnet18, or "
        "package.module:factory",
    )
    levels.add_argument("teacher", nargs="?", help="the same for the teacher")
    levels.add_argument("--imgsz", type=int, default=640, help="side of the probe's square image in pixels")
    levels.set_defaults(run=levels_command)

    evaluate = commands.add_parser("eval", help="COCO metrics (pycocotools) of a model, also per class")
    evaluate.add_argument("model", help="YOLO weights")
    evaluate.add_argument(
        "settings", nargs="*", metavar="key=value", help="data= (required), split=, imgsz=, batch=, device=, nms=, ..."
    )
    evaluate.add_argument("--json", type=Path, help="file to write the numbers to")
    evaluate.set_defaults(run=_eval)

    show = commands.add_parser("show", help="pictures of what teacher and student attend to, as PNG files")
    show.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="student=, teacher= and data= (required), images= (4; or files), split=, imgsz=, out=, top=, config=, "
        "fgd.*=",
    )
    show.set_defaults(run=_show)

    compare = commands.add_parser("compare", help="tables and curves of several runs; seeds of one arm are averaged")
    compare.add_argument("folders", nargs="+", metavar="RUN", help="folder of an Ultralytics run")
    compare.add_argument("--data", help="data yaml or COCO json to measure the weights on (AP by class and size)")
    compare.add_argument("--split", default="val", help="split of the data yaml")
    compare.add_argument("--weights", choices=("last", "best"), default="last", help="which weights to measure")
    compare.add_argument("--device", help="where to measure them, as in Ultralytics")
    compare.add_argument("--json", type=Path, help="file to write everything to")
    compare.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    compare.add_argument("--out", type=Path, help="folder to draw curves.png in")
    compare.set_defaults(run=_compare)

    quickstart = commands.add_parser(
        "quickstart", help="watch a small YOLO learn from a bigger one, on drawn data, without any download"
    )
    quickstart.add_argument("--out", type=Path, default=Path("quickstart"), help="folder for data, runs and report")
    quickstart.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the student runs")
    quickstart.set_defaults(run=_quickstart)

    add_parser(commands)

    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    try:
        status = int(arguments.run(arguments) or 0)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader (head, say) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except USER_ERRORS as error:
        print(f"fgd {arguments.command}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name != "clip":
            raise
        print(f"fgd {arguments.command}: {NO_TEXT_ENCODER}", file=sys.stderr)
        return 2


def key_values(settings: Sequence[str]) -> dict[str, Any]:
    """``["imgsz=640", ...]`` as Ultralytics' own command line reads it.

    Raises:
        ConfigError: a text without "=", or a key that is given twice.
    """
    from ultralytics.cfg import parse_key_value_pair

    values: dict[str, Any] = {}
    for text in settings:
        if "=" not in text or text.startswith("="):
            raise ConfigError(f"{text!r} cannot be read; expected key=value.")
        key, value = parse_key_value_pair(text)
        if key in values:
            raise ConfigError(f"{key} is given twice.")
        if key == "teacher" and isinstance(value, str) and value.startswith("[") and value.endswith("]"):
            value = [file.strip(" '\"") for file in value[1:-1].split(",")]
        values[key] = value
    return values


def _training_settings(arguments: argparse.Namespace, *more: tuple[str, str]) -> tuple[dict[str, Any], FGDConfig]:
    """The settings for Ultralytics, with teacher and model, and the distillation's configuration.

    Args:
        arguments: of the command.
        *more: keys that are required besides teacher and model, with what they mean.

    Raises:
        ConfigError: a key is missing, unknown, given twice, or has an impossible value.
    """
    ours = [text.removeprefix("fgd.") for text in arguments.settings if text.startswith("fgd.")]
    rest = [text for text in arguments.settings if not text.startswith("fgd.")]
    settings = key_values(rest)
    config = load_config(settings.pop("config", None), ours)
    if not settings.get("teacher") and config.teachers and all(share.name for share in config.teachers):
        settings["teacher"] = [share.name for share in config.teachers]
    for key, meaning in (("teacher", "weights of the teacher"), ("model", "weights or yaml of the student"), *more):
        if not settings.get(key):
            raise ConfigError(f"{key}= is missing ({meaning}); see fgd {arguments.command} --help.")
    return settings, config


def _train(arguments: argparse.Namespace) -> None:
    settings, config = _training_settings(arguments)

    from fgd_hooks.integrations.ultralytics.callback import FGDCallback

    callback = FGDCallback(settings.pop("teacher"), config)
    model = load_yolo(settings.pop("model"))
    if "data" in settings:
        check_data(str(settings["data"]))
    callback.attach(model)
    try:
        model.train(**settings)
    except SyntaxError as error:  # Ultralytics' own word for an unknown key
        raise ConfigError(str(error)) from error


def _doctor(arguments: argparse.Namespace) -> int:
    import json

    from rich.console import Console

    from fgd_hooks.integrations.ultralytics.doctor import diagnose_training
    from fgd_hooks.pairing import check_names

    settings, config = _training_settings(arguments, ("data", "yaml file of the data set"))
    check_names(config)
    check_data(str(settings["data"]))
    model, data = (str(settings.pop(key)) for key in ("model", "data"))
    report = diagnose_training(settings.pop("teacher"), load_yolo(model), data, config, settings)
    Console().print(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False), encoding="utf-8")
    return int(report.status == "red" or (arguments.strict and report.status == "yellow"))


def check_data(data: str) -> None:
    """Refuse a data yaml that neither exists nor is one that Ultralytics brings along.

    Raises:
        FileNotFoundError: names the file.
    """
    from ultralytics.utils.checks import check_file

    if data.endswith((".yaml", ".yml")) and "://" not in data and not check_file(data, hard=False):
        raise FileNotFoundError(f"The data file {data!r} does not exist, here or among Ultralytics' own data sets.")


def _eval(arguments: argparse.Namespace) -> None:
    import inspect
    import json

    from rich.console import Console

    from fgd_hooks.evaluation.evaluate import evaluate

    settings = key_values(arguments.settings)
    if not settings.get("data"):
        raise ConfigError("data= is missing: a data yaml (YOLO format) or an annotation json (COCO format).")
    known = [name for name in inspect.signature(evaluate).parameters if name != "model"]
    for key in settings:
        if key not in known:
            raise ConfigError(f"There is no setting {key!r}. {suggestion(key, known)}")
    result = evaluate(arguments.model, **settings)
    Console().print(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result.to_dict(), indent=1), encoding="utf-8")


def _show(arguments: argparse.Namespace) -> None:
    from fgd_hooks.cli.show import show_command

    ours = [text.removeprefix("fgd.") for text in arguments.settings if text.startswith("fgd.")]
    show_command(key_values([text for text in arguments.settings if not text.startswith("fgd.")]), ours)


def _compare(arguments: argparse.Namespace) -> None:
    import json

    from rich.console import Console

    from fgd_hooks.evaluation.compare import compare

    result = compare(
        arguments.folders,
        data=arguments.data,
        split=arguments.split,
        weights=arguments.weights,
        device=arguments.device,
    )
    if arguments.markdown:
        print(result.markdown())
    else:
        Console().print(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result.to_dict(), indent=1), encoding="utf-8")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        result.draw(arguments.out / "curves.png")


def _quickstart(arguments: argparse.Namespace) -> None:
    from fgd_hooks.study.quickstart import quickstart

    quickstart(arguments.out, seeds=arguments.seeds)


if __name__ == "__main__":
    sys.exit(main())
