"""The ``fgd`` command: a table of its sub-commands. Nothing heavy is imported before one of them runs."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from fgd_hooks import __version__
from fgd_hooks.cli import study
from fgd_hooks.errors import ConfigError, FGDError, needs_extra
from fgd_hooks.utils.registry import suggestion


class Command(NamedTuple):
    """A sub-command, one entry of the table below."""

    run: str  # module and function below ``fgd_hooks.cli``: takes the parsed arguments, returns an exit code or None
    help: str  # its line in ``fgd --help``
    arguments: list[tuple[str, str, dict[str, Any]]]  # name, help and settings of each
    epilog: str = ""
    extra: str | None = None  # what to install where a package is missing; None: the extra of that package
    again: str = "the same command begins anew"  # how to go on after Ctrl-C


SETTINGS: dict[str, Any] = {"nargs": "*", "metavar": "key=value"}
FLAG: dict[str, Any] = {"action": "store_true"}
FILE: dict[str, Any] = {"type": Path}
TRAIN_EPILOG = """\
example:
  fgd train teacher=yolo26s.pt model=yolo26n.pt data=coco8.yaml epochs=100 imgsz=640 fgd.balance.ratio=0.5
  fgd train model=runs/detect/train resume=True

keys:
  teacher=   weights or run folder of the teacher, or several, a.pt,b.pt (required, unless fgd.teachers names them)
  model=     weights or yaml of the student (required); with resume=True the run folder or the last.pt to go on from
  data=      yaml file of the data set (required)
  resume=    True, or the run folder: goes on with the teacher and the settings that the run was begun with
  config=    settings of the distillation: a YAML file or a recipe's name (yolo, start, imitation, paper/fcos, ...)
  fgd.*=     single settings of the distillation (fgd settings lists them); they win over config=
  all other keys go to Ultralytics' model.train() unchanged
"""
DOCTOR_EPILOG = """\
example:
  fgd doctor teacher=yolo26s.pt model=yolo26n.pt data=coco8.yaml imgsz=640

keys: those of fgd train. Nothing is trained, and no run is left behind.

exit code: 0 no red finding (with --strict: all green), 1 otherwise, 2 a mistake on the command line or a missing file
"""
MEASURED = "data= (required: data yaml or COCO json), split=, imgsz=, batch=, device=, nms=, ..."
MODEL = (
    "the student: YOLO weights, yaml or run folder, torchvision:retinanet_resnet50_fpn, timm:resnet18, "
    "transformers:RTDetrConfig or package.module:factory"
)
SHOWN = "student=, teacher=, data= (required), images= (4; or files), before=, split=, imgsz=, out=, top=, fgd.*="


COMMANDS = {
    "train": Command(
        "train:train",
        "train a YOLO student with a teacher",
        [("settings", "see below", SETTINGS)],
        TRAIN_EPILOG,
        "ultralytics",
        "to go on: fgd train model=RUN resume=True, with the folder of the run",
    ),
    "doctor": Command(
        "train:doctor",
        "check a distillation before the training: takes what train takes",
        [
            ("settings", "see below", SETTINGS),
            ("--strict", "exit code 1 for yellow findings as well", FLAG),
            ("--verbose", "show what is green, too", FLAG),
            ("--json", "file to write the findings to", FILE),
        ],
        DOCTOR_EPILOG,
        "ultralytics",
    ),
    "levels": Command(
        "levels:levels_command",
        "show a model's feature levels, and how a teacher's pair with them",
        [
            ("model", MODEL, {}),
            ("teacher", "the same for the teacher", {"nargs": "?"}),
            ("--imgsz", "side of the probe's square image in pixels", {"type": int, "default": 640}),
            ("--example", "shape of the probe's images instead, such as 1,3,512,640", {}),
            ("--json", "print JSON instead of a table", {"action": "store_true"}),
        ],
    ),
    "eval": Command(
        "evaluate:eval_command",
        "COCO metrics (pycocotools) of a model, also per class",
        [
            ("model", "YOLO weights or the folder of a run", {}),
            ("settings", MEASURED, SETTINGS),
            ("--json", "file to write the numbers to", FILE),
        ],
        extra="ultralytics",
    ),
    "show": Command(
        "show:show_command",
        "pictures of what teacher and student attend to, as PNG files",
        [("settings", SHOWN, SETTINGS)],
        extra="ultralytics",
    ),
    "compare": Command(
        "evaluate:compare_command",
        "tables and curves of several runs; seeds of one arm are averaged",
        [
            ("folders", "folder of an Ultralytics run", {"nargs": "+", "metavar": "RUN"}),
            ("--data", "data yaml or COCO json to measure the weights on (AP by class and size)", {}),
            ("--split", "split of the data yaml", {"default": "val"}),
            ("--weights", "which weights to measure", {"choices": ("last", "best"), "default": "last"}),
            ("--device", "where to measure them, as in Ultralytics", {}),
            ("--json", "file to write everything to", FILE),
            ("--markdown", "print the tables as Markdown", FLAG),
            ("--out", "folder to draw curves.png in", FILE),
        ],
    ),
    "settings": Command(
        "settings:settings_command",
        "list all settings of the distillation (fgd.*) with default and meaning",
        [("--json", "as a JSON schema, with which editors check and complete a configuration", FLAG)],
    ),
    "quickstart": Command(
        "study:quickstart_command",
        "watch a small YOLO learn from a bigger one, on drawn data, without any download",
        [
            ("--out", "folder for data, runs and report", {"type": Path, "default": Path("quickstart")}),
            ("--seeds", "seeds of the student runs", {"type": int, "nargs": "+", "default": [0]}),
        ],
        extra="ultralytics",
        again="the same command goes on, with the teacher if that is trained",
    ),
    "study": Command(
        "study:study_command",
        "arms x seeds x data sets: train side by side, resumable; tables and plots",
        study.ARGUMENTS,
        study.EPILOG,
        again="the same command goes on with the runs that are left",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: the command's own, 2 for a mistake of the user's (one clear line), 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    name, rest = (given[0], given[1:]) if given else ("", [])
    command, said = COMMANDS.get(name), f"fgd {name}"
    logging.basicConfig(format="%(message)s")
    try:
        if command is None:
            if name and not name.startswith("-"):
                said = "fgd"
                raise ConfigError(f"There is no command {name!r}. {suggestion(name, COMMANDS)}")
            parser = _parser()
            if not name:
                parser.print_help(sys.stderr)
                raise SystemExit(2)
            parser.parse_args(given)
            return 0
        arguments = _parser().parse_args([name, *as_arguments(command, rest)])
        with needs_extra(command.extra):
            module, _, function = command.run.partition(":")
            run = getattr(importlib.import_module(f"fgd_hooks.cli.{module}"), function)
            status = int(run(arguments) or 0)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader (head, say) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as error:
        again = str(error) or (command.again if command else "the same command begins anew")
        print(f"\n{said}: interrupted; {again}.", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name != "clip":
            raise
        from fgd_hooks.integrations.ultralytics.compat import NO_TEXT_ENCODER

        print(f"{said}: {NO_TEXT_ENCODER}", file=sys.stderr)
    except (FGDError, FileNotFoundError) as error:
        print(f"{said}: {error}", file=sys.stderr)
    except Exception as error:  # a host's, as a rule, about a value that it refuses
        with tempfile.NamedTemporaryFile("w", prefix="fgd_", suffix=".txt", delete=False) as file:
            traceback.print_exc(file=file)
        text = " ".join(str(error).split())
        print(f"{said}: {type(error).__name__}: {text:.300} (where: {file.name})", file=sys.stderr)
    return 2


def as_arguments(command: Command, given: Sequence[str]) -> list[str]:
    """A command's words as argparse takes them: what it names itself may also be given as ``key=value``.

    Places first, then ``key=value`` settings, then options.
    """
    if {"-h", "--help"} & set(given):
        return ["--help"]
    table = {name.lstrip("-").replace("-", "_"): (name, text, settings) for name, text, settings in command.arguments}
    free = table.pop("settings", None)
    places: dict[str, list[str]] = {key: [] for key, (name, *_) in table.items() if not name.startswith("-")}
    loose: list[str] = []
    settings: list[str] = []
    options: list[str] = []
    words = list(given)
    while words:
        word = words.pop(0)
        key, equals, value = word.partition("=")
        name, _, kind = table.get(key.lstrip("-").replace("-", "_"), ("", "", {}))
        if word.startswith("-"):
            options.append(word)
            many = kind.get("nargs") == "+"
            takes = not equals and name and "action" not in kind
            while takes and words and not words[0].startswith("-"):
                options.append(words.pop(0))
                takes = many
        elif not equals or Path(word).exists():
            loose.append(word)
        elif name and kind.get("nargs") == "+":
            from fgd_hooks.cli.settings import split_list

            found = split_list(value)
            options += [] if key in places else [name, *found]
            places.get(key, []).extend(found)
        elif name and key in places:
            places[key].append(value)
        elif name and "action" in kind:
            options += [name] if value.lower() in ("true", "1", "yes") else []
        elif name:
            options.append(f"{name}={value}")
        elif free or not re.fullmatch(r"[\w.-]+", key):
            settings.append(word)
        else:
            raise ConfigError(f"There is no setting {key!r}. {suggestion(key, table)}")
    for key, found in places.items():
        kind = table[key][2]
        while loose and (not found or kind.get("nargs") == "+"):
            found.append(loose.pop(0))
        if not found and kind.get("nargs") != "?":
            raise ConfigError(f"{key}= is missing ({table[key][1]}); --help lists the settings.")
    return [*(each for found in places.values() for each in found), *loose, *settings, *options]


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, printed by :func:`main`."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists what there is.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fgd", description="Focal and Global Distillation for object detectors.")
    parser.add_argument("--version", action="version", version=f"fgd_hooks {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        raw = argparse.RawDescriptionHelpFormatter
        epilog = command.epilog + "\nEach --option and each place may also be given as key=value.\n"
        own = commands.add_parser(name, help=command.help, epilog=epilog, formatter_class=raw, allow_abbrev=False)
        for argument, text, settings in command.arguments:
            own.add_argument(argument, help=text, **settings)
    if "_ARGCOMPLETE" in os.environ:  # set by the shell: eval "$(register-python-argcomplete fgd)"
        import argcomplete

        argcomplete.autocomplete(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
