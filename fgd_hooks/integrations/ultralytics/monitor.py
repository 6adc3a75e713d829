"""What a training leaves to read: settings, TensorBoard scalars and pictures, the lines at its start."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fgd_hooks.config import FGDConfig, TeacherShare, config_to_dict, load_config, save_config
from fgd_hooks.diagnostics.attention import LevelSheet, attention_distances, attention_sheets
from fgd_hooks.diagnostics.cost import extra_cost
from fgd_hooks.diagnostics.doctor import first_step
from fgd_hooks.diagnostics.tensorboard import (
    BEST_MAP,
    EPOCH_MAP,
    FINAL_MAP,
    FINAL_MAP50,
    hyper_parameters,
    write_hyper_parameters,
    write_scalars,
    write_sheets,
)
from fgd_hooks.distiller import Distilled, Distiller
from fgd_hooks.errors import ConfigError
from fgd_hooks.evaluation.runs import MAP, MAP50, SHOWN_KEYS, flat
from fgd_hooks.masks import PackedBoxes
from fgd_hooks.utils.modules import gradient_norm
from fgd_hooks.utils.preserve import RandomState

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


logger = logging.getLogger("ultralytics")


WATCHED, PICTURED = 4, 2
"""So many fixed validation images give the attention distance; so many of them are drawn."""


WATCH_STEPS, PICTURE_STEPS, PICTURE_EPOCHS = 50, 500, 10
"""Unless an interval is given: at least so many training steps from one distance to the next, and so many steps and
epochs from one set of pictures to the next. A distance costs about as much as one step, a set of pictures as much as 15
on a CPU (yolo26n at 192 pixels), so that epochs of a few steps would cost more to watch than to train."""


class AttentionWatch:
    """Writes the attention distance after epochs, and sheets now and then, to TensorBoard.

    Student means what is validated and saved, the moving average, through the adapters as they are trained so far.
    Nothing of the training is touched: random states, modes, batch statistics and gradients stay as they are. If
    something fails here, it is said once and the training goes on without.

    Args:
        distiller: of the training.
        dataset: Ultralytics' validation data set; its images are read once and kept.
        boxes_of: packs the boxes of a collated batch.
        interval: epochs from one set of pictures to the next, with a distance for each epoch; 0: no pictures; None: as
            often as :data:`WATCH_STEPS`, :data:`PICTURE_STEPS` and :data:`PICTURE_EPOCHS` say. The first and the last
            epoch have both in any case.
    """

    def __init__(
        self,
        distiller: Distiller,
        dataset: Any,
        boxes_of: Callable[[Mapping[str, Tensor]], PackedBoxes],
        interval: int | None,
    ) -> None:
        self.distiller = distiller
        self.dataset = dataset
        self.boxes_of = boxes_of
        self.interval = interval
        self.failed = False
        self._batches: list[Mapping[str, Tensor]] | None = None
        self._watched: int | None = None  # the step of the last distance
        self._drawn: tuple[int, int] | None = None  # epoch and step of the last pictures

    def write(self, writer: Any, student: nn.Module, epoch: int, *, last: bool = False) -> None:
        """Write what belongs to an epoch, from 0; the axis is the number of epochs done. ``last`` draws in any case."""
        if self.failed:
            return
        step = self.distiller.clock.step
        drawn = self._draws(epoch, step, last)
        if not (drawn or last or self._watches(step)):
            return
        self._watched = step
        self._drawn = (epoch, step) if drawn else self._drawn
        try:
            sheets = self.sheets(student)
            distances = {f"fgd/attention_distance/{k}": v for k, v in attention_distances(sheets).items()}
            write_scalars(writer, distances, epoch + 1)
            if drawn:
                pictured = sheets[: PICTURED * len(self.distiller.pairs)]
                write_sheets(writer, pictured, epoch + 1)
        except Exception as error:  # a picture is not worth a training
            self.failed = True
            logger.warning("FGD: attention is no longer watched (%s: %s).", type(error).__name__, error)

    def _watches(self, step: int) -> bool:
        return self.interval is not None or self._watched is None or step - self._watched >= WATCH_STEPS

    def _draws(self, epoch: int, step: int, last: bool) -> bool:
        if self.interval is not None:
            return self.interval > 0 and (last or epoch % self.interval == 0)
        if last or self._drawn is None:
            return True
        return epoch - self._drawn[0] >= PICTURE_EPOCHS and step - self._drawn[1] >= PICTURE_STEPS

    def sheets(self, student: nn.Module) -> list[LevelSheet]:
        """The sheets of all watched images, one image at a time, since their sizes may differ."""
        if self._batches is None:
            state = RandomState.now()  # Ultralytics draws random numbers even where it formats an image
            self._batches = fixed_batches(self.dataset, WATCHED)
            state.restore()
        found: list[LevelSheet] = []
        for number, batch in enumerate(self._batches):
            images = batch["img"].float() / 255
            found += attention_sheets(
                self.distiller, student, images, self.boxes_of(batch), names=[f"validation image {number + 1}"]
            )
        return found


def fixed_batches(dataset: Any, count: int) -> list[Mapping[str, Tensor]]:
    """So many images of an Ultralytics data set, each a batch of its own: evenly spaced, with boxes where there are."""
    labels = getattr(dataset, "labels", [])
    usable = [number for number, label in enumerate(labels) if len(label["bboxes"])] or list(range(len(dataset)))
    count = min(count, len(usable))
    chosen = [usable[number * len(usable) // count] for number in range(count)]
    return [dataset.collate_fn([dataset[number]]) for number in chosen]


logger = logging.getLogger("ultralytics")  # the host's own console and log file


PATIENCE = 5  # distilling batches that are waited for one with objects and a finite gradient


def announce(distiller: Distiller, batch: int, size: int) -> None:
    """Say in one line what is distilled into what, and what that costs per step of ``batch`` images."""
    try:
        logger.info("FGD: %s.", extra_cost(distiller, batch, size))
    except Exception as error:  # the line is a service: a teacher that takes no zeros must not end the training for it
        logger.info("FGD: %s", distiller.describe().replace("\n", "\nFGD: "))
        logger.warning("FGD: the cost per step could not be computed: %s", error)


class FirstLook:
    """Looks once at a distilling step and says whether all is well. It only reads what the step leaves behind.

    A step whose batch has no object, or at which no finite gradient arrived (a gradient scaler's first steps), is
    passed over, ``PATIENCE`` times at most.

    Args:
        distiller: at work.
        parameters: of adapters and losses.
    """

    def __init__(self, distiller: Distiller, parameters: Sequence[nn.Parameter]) -> None:
        self.distiller = distiller
        self.parameters = parameters
        self.patience = PATIENCE
        self.seen: tuple[Distilled, PackedBoxes] | None = None

    def see(self, distilled: Distilled, boxes: PackedBoxes) -> None:
        """Note a step before its backward pass."""
        if self.patience and distilled.weight:
            self.seen = distilled, boxes

    def look(self, stepped_norm: float) -> None:
        """After the step: look, and say what was found.

        Args:
            stepped_norm: norm of the parameters' gradient when their optimizer stepped; else their gradients are there.
        """
        if self.seen is None:
            return
        (distilled, boxes), self.seen = self.seen, None
        norm = stepped_norm or gradient_norm(p.grad for p in self.parameters)
        arrived = 0 < norm < math.inf or not self.parameters
        self.patience -= 1
        if self.patience and not (len(boxes) and arrived):
            return
        self.patience = 0
        report = first_step(self.distiller, distilled, boxes, norm)
        if not report.troubles:
            names = ", ".join(finding.name for finding in report.findings)
            logger.info("FGD: the first distilling step is well (%s).", names)
        for finding in report.troubles:
            logger.warning("FGD: %s", finding)
