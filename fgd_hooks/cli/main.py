"""The ``fgd`` command: a table of its sub-commands. Nothing heavy is imported before one of them runs."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fgd_hooks import __version__
from fgd_hooks.cli import study
from fgd_hooks.errors import FGDError, needs_extra


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

keys:
  teacher=   weights of the teacher, or several, teacher=[a.pt,b.pt] (required, unless fgd.teachers names them)
  model=     weights or yaml of the student; with resume=True the last.pt to go on from (required)
  config=    settings of the distillation: a YAML file or a recipe's name (yolo, start, imitation, paper/fcos, ...)
  fgd.*=     single settings of the distillation; they win over config=
  all other keys go to Ultralytics' model.train() unchanged
"""
DOCTOR_EPILOG = """\
example:
  fgd doctor teacher=yolo26s.pt model=yolo26n.pt data=coco8.yaml imgsz=640

keys: those of fgd train, with data= required as well. Nothing is trained, and no run is left behind.

exit code: 0 no red finding (with --strict: all green), 1 otherwise, 2 a mistake on the command line or a missing file
"""
MEASURED = "data= (required: data yaml or COCO json), split=, imgsz=, batch=, device=, nms=, ..."
MODEL = (
    "the student: YOLO weights, yaml or run folder, torchvision:retinanet_resnet50_fpn, timm:resnet18, "
    "transformers:RTDetrConfig or package.module:factory"
)
SHOWN = "student=, teacher= and data= (required), images= (4; or files), split=, imgsz=, out=, top=, config=, fgd.*="

COMMANDS = {
    "train": Command(
        "train:train",
        "train a YOLO student with a teacher",
        [("settings", "see below", SETTINGS)],
        TRAIN_EPILOG,
        "ultralytics",
        "to go on: the same command with model=RUN/weights/last.pt resume=True",
    ),
    "doctor": Command(
        "train:doctor",
        "check a distillation before the training: takes what train takes",
        [
            ("settings", "see below", SETTINGS),
            ("--strict", "exit code 1 for yellow findings as well", FLAG),
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
            ("model", "YOLO weights", {}),
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
    arguments = _parser().parse_args(argv)
    command = COMMANDS[arguments.command]
    module, _, function = command.run.partition(":")
    logging.basicConfig(format="%(message)s")
    try:
        with needs_extra(command.extra):
            run = getattr(importlib.import_module(f"fgd_hooks.cli.{module}"), function)
            status = int(run(arguments) or 0)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader (head, say) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"\nfgd {arguments.command}: interrupted; {command.again}.", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name != "clip":
            raise
        from fgd_hooks.integrations.ultralytics.compat import NO_TEXT_ENCODER

        print(f"fgd {arguments.command}: {NO_TEXT_ENCODER}", file=sys.stderr)
        return 2
    except (FGDError, FileNotFoundError) as error:
        print(f"fgd {arguments.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fgd", description="Focal and Global Distillation for object detectors.")
    parser.add_argument("--version", action="version", version=f"fgd_hooks {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        raw = argparse.RawDescriptionHelpFormatter
        own = commands.add_parser(name, help=command.help, epilog=command.epilog, formatter_class=raw)
        for argument, text, settings in command.arguments:
            own.add_argument(argument, help=text, **settings)
    if "_ARGCOMPLETE" in os.environ:  # set by the shell: eval "$(register-python-argcomplete fgd)"
        import argcomplete

        argcomplete.autocomplete(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
