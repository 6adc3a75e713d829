"""``fgd doctor``: the check-up of a YOLO distillation on the user's own data, before a training.

The student, the batch (with augmentation) and the optimizer of the adapters come from Ultralytics' own trainer, which
is stopped before its first step; it works in a folder that is removed again. Only the label cache that Ultralytics puts
beside the labels of a data set may stay. The check-up computes in float32 (amp off) and on one device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fgd_hooks.config import FGDConfig
from fgd_hooks.diagnostics.checks import check_teacher
from fgd_hooks.diagnostics.cost import extra_cost
from fgd_hooks.diagnostics.doctor import diagnose
from fgd_hooks.diagnostics.report import Finding, Report, green, red, yellow
from fgd_hooks.errors import ConfigError, DataError, PairingError, TapError, TeacherError
from fgd_hooks.evaluation.evaluate import evaluate
from fgd_hooks.evaluation.readers import quiet_ultralytics
from fgd_hooks.integrations.ultralytics.compat import check_task, images_counted
from fgd_hooks.integrations.ultralytics.initialization import inherit_into
from fgd_hooks.integrations.ultralytics.session import TrainingSession
from fgd_hooks.integrations.ultralytics.settings import named_config
from fgd_hooks.integrations.ultralytics.teacher import (
    as_list,
    check_channels,
    file_of,
    fuse_files,
    load_teachers,
    with_score_taps,
)
from fgd_hooks.pairing import plan_pairs
from fgd_hooks.teacher import check_apart, check_finite, doubts

EVALUATED = 64  # images of the validation set, evenly spread
NOTHING, WEAK, NOISE = 0.02, 0.10, 0.02  # mAP50-95 of 0..1: finds nothing, finds little, difference of no meaning
OURS = ("project", "name", "exist_ok", "save_dir", "resume", "amp", "plots", "verbose")


class _Examined(BaseException):
    """Ends a training before its first step; no ``except Exception`` of the host's swallows it."""


def diagnose_training(
    student: Any,
    *,
    teacher: str | Path | Sequence[str | Path],
    data: str,
    config: FGDConfig,
    settings: dict[str, Any] | None = None,
) -> Report:
    """Check teacher, student and data as ``fgd train`` would put them together.

    Args:
        student: a ``YOLO`` or ``RTDETR`` object.
        teacher: weights file, or several.
        data: data yaml.
        config: of the distillation.
        settings: further ones of ``model.train()``: imgsz, batch, ...
    """
    settings = dict(settings or {})
    if settings.get("resume"):
        raise ConfigError("resume= makes no sense for a check-up; give the last.pt as model=.")
    check_task(student, config.boxes_from)
    files = as_list(teacher)
    modules = load_teachers(files)
    try:
        for module in modules:
            check_finite(module)
            check_apart(student.model, module)
        plan_pairs(student.model, modules, with_score_taps(config, modules))
    except TeacherError as error:
        return Report((red("teacher", str(error), "Use another teacher file."),))
    except (TapError, PairingError) as error:
        return Report((red("levels", str(error), "Choose a teacher or taps whose levels fit."),))
    told = [check_teacher(doubts(student.model, module)) for module in modules]  # before they are fused
    measured: dict[str, Any] = {key: settings[key] for key in ("imgsz", "batch", "device") if key in settings}
    if not isinstance(measured.get("batch", 1), int) or measured.get("batch", 1) < 1:
        del measured["batch"]  # Ultralytics' automatic batch
    trained = file_of(student) if getattr(student, "ckpt", None) else None
    with quiet_ultralytics():
        # first, since it knows misspelt settings
        findings = _examine(student, modules, files, named_config(config, teacher), {**settings, "data": data})
        quality = [check_quality(trained, teacher=str(file), data=data, settings=measured) for file in files]
    sizes = [check_size(file, module, settings.get("imgsz")) for file, module in zip(files, modules, strict=True)]
    told_of = [each for each in told if each.status != "green"]
    return Report((*quality, *filter(None, sizes), *told_of, *findings))


def _examine(
    model: Any, teachers: Sequence[nn.Module], files: Sequence[str | Path], config: FGDConfig, settings: dict[str, Any]
) -> list[Finding]:
    """Let Ultralytics build a training, and examine the distillation where it would begin."""
    config = dataclasses.replace(config, log_interval=0)
    found: list[Finding] = []

    def run_callbacks(trainer: Any, event: str) -> None:
        """Instead of all callbacks, also those of loggers, which would record a run."""
        if event != "on_train_start":
            return
        try:
            check_channels(trainer.model, teachers)
        except TeacherError as error:
            found.append(red("teacher", str(error), "Use another teacher file."))
            raise _Examined from None
        line, expected = inherit_into(trainer, teachers[0], config.inherit)
        text = line or "The student begins with the weights that it has."
        found.append(Finding("green" if expected else "yellow", "start", text))
        try:
            session = TrainingSession(trainer, fuse_files(teachers, files, config.teacher), config)
        except ConfigError:
            raise
        except (TapError, ValueError) as error:
            found.append(red("levels", str(error), "Choose a teacher or taps whose levels fit."))
            raise _Examined from None
        try:
            found.extend(_check(trainer, session))
        finally:
            session.remove()
        raise _Examined

    trainer = type("ExaminedTrainer", (model.task_map[model.task]["trainer"],), {"run_callbacks": run_callbacks})
    settings = {key: value for key, value in settings.items() if key not in OURS}
    with tempfile.TemporaryDirectory(prefix="fgd_doctor_") as folder, contextlib.suppress(_Examined):
        settings |= {"project": folder, "name": "doctor", "amp": False, "plots": False, "verbose": False}
        try:
            model.train(trainer=trainer, **settings)
        except SyntaxError as error:  # Ultralytics' own word for an unknown key
            raise ConfigError(str(error)) from error
    return found


def _check(trainer: Any, session: TrainingSession) -> list[Finding]:
    """Examine one real training batch in a trainer that is set up."""
    trainer.model.train()
    batch = trainer.preprocess_batch(next(iter(trainer.train_loader)))
    distiller, images = session.distiller, batch["img"]
    distiller.set_epoch(0, trainer.epochs)

    count = images_counted(session.model, len(images))

    def loss() -> Tensor:
        total: Tensor = trainer.model(batch)[0].sum() / count  # as the distillation's
        return total

    report = diagnose(distiller, images, session.boxes_of(batch), loss=loss, optimizer=session.optimizer)
    cost = extra_cost(distiller, trainer.batch_size, int(trainer.args.imgsz))
    # the teacher is fused here, and its mAP is measured
    return [green("cost", f"{cost}."), *(each for each in report.findings if each.name != "teacher")]


def check_size(file: Any, teacher: nn.Module, imgsz: Any) -> Finding | None:
    """A note where the teacher will see images of another size than it was trained with."""
    arguments = getattr(teacher, "args", None)
    trained = arguments.get("imgsz") if isinstance(arguments, dict) else getattr(arguments, "imgsz", None)
    given = 640 if imgsz is None else imgsz
    if not (isinstance(trained, int) and isinstance(given, int)) or 0.8 <= given / trained <= 1.25:
        return None
    found = f"{Path(str(file)).name} was trained with images of {trained} pixels; here it gets {given}."
    return yellow("image size", found, f"Use imgsz={trained}, or a teacher that was trained with {given}.")


def check_quality(student: str | None, *, teacher: str, data: str, settings: dict[str, Any]) -> Finding:
    """Whether the teacher's file detects on the user's own validation images, and better than the student's.

    The student is None where it is not trained yet; ``settings`` are imgsz, batch and device.
    """
    name = "teacher's mAP"
    try:
        result = evaluate(teacher, data, limit=EVALUATED, **settings)
    except (DataError, FileNotFoundError, ModuleNotFoundError) as error:  # the last: YOLO-World without a text encoder
        mend = "Well if the teacher has other classes or another task; else mend this, since it says most."
        return yellow(name, f"It could not be measured: {error}.", mend)
    theirs = result.map50_95 or 0.0  # None only where the images have no box, which evaluate() refuses
    own, values = -math.inf, {"teacher": theirs}
    found = f"mAP50-95 of the teacher on {result.images} validation images: {100 * theirs:.1f}"
    if result.left_out:
        found += f" ({result.left_out} images or boxes that cannot be used left out)"
    if student is not None:
        try:
            own = values["student"] = evaluate(student, data, limit=EVALUATED, **settings).map50_95 or 0.0
            found += f", of the student as it is {100 * own:.1f}"
        except DataError:
            found += "; the student was trained on other classes"
    train_first = "Train the teacher on this data first, or use one that was; a weak teacher teaches its errors."
    better = "Use a better teacher (bigger, or trained longer)"
    swapped, little = f"{better}; were the two files swapped?", f"{better}; this one has little to teach."
    for holds, colour, said, mend in (
        (theirs < NOTHING, red, "It finds next to nothing.", train_first),
        (own > theirs + NOISE, red, "The student is better than the teacher.", swapped),
        (own > theirs - NOISE, yellow, "The teacher is no better than the student.", little),
        (theirs < WEAK, yellow, "That is weak.", train_first),
    ):
        if holds:
            return colour(name, f"{found}. {said}", mend, values)
    return green(name, f"{found}.", values)
