"""What a training says and shows of its distillation: lines in the host's log, scalars and pictures in TensorBoard."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fgd_hooks.config import FGDConfig
from fgd_hooks.diagnostics.attention import LevelSheet, attention_distances, attention_sheets
from fgd_hooks.diagnostics.cost import extra_cost
from fgd_hooks.diagnostics.doctor import first_step
from fgd_hooks.diagnostics.report import Report
from fgd_hooks.diagnostics.tensorboard import (
    BEST_MAP,
    EPOCH_MAP,
    FINAL_MAP,
    FINAL_MAP50,
    distillation_scalars,
    hyper_parameters,
    write_hyper_parameters,
    write_layout,
    write_scalars,
    write_sheets,
)
from fgd_hooks.distilled import Distilled
from fgd_hooks.distiller import Distiller
from fgd_hooks.evaluation.runs import MAP, MAP50
from fgd_hooks.masks import PackedBoxes
from fgd_hooks.utils.modules import gradient_norm
from fgd_hooks.utils.preserve import RandomState

logger = logging.getLogger("ultralytics")  # the host's own console and log file

HOST_SETTINGS = ("model", "data", "epochs", "batch", "imgsz", "optimizer", "lr0", "seed")

PATIENCE = 5  # distilling batches that are waited for one with objects and a finite gradient

WATCHED, PICTURED = 4, 2
"""So many fixed validation images give the attention distance; so many of them are drawn."""

WATCH_STEPS, PICTURE_STEPS, PICTURE_EPOCHS = 50, 500, 10
"""Unless an interval is given: at least so many training steps from one distance to the next, and so many steps and
epochs from one set of pictures to the next. A distance costs about as much as one step, a set of pictures as much as 20
on a CPU (yolo26n at 192 pixels), so that epochs of a few steps would cost more to watch than to train."""

BoxesOf = Callable[[Mapping[str, Tensor]], PackedBoxes]


class RunMonitor:
    """Reports the task's side of one training, distilled or not, on its first rank; it only reads."""

    def __init__(self, trainer: Any, config: FGDConfig) -> None:
        self.trainer = trainer
        self.config = config
        self.writer: Any = None
        self.owns_writer = False
        self.trained_epoch = -1
        self.last_metrics: dict[str, float] = {}

    def open(self, levels: Sequence[str] = ()) -> None:
        """Open TensorBoard: Ultralytics' writer where it has one, else one of our own in the same directory."""
        if self.config.log_interval == 0:
            return
        from ultralytics.utils.callbacks import tensorboard

        self.writer = getattr(tensorboard, "WRITER", None)
        if self.writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                logger.warning("FGD: tensorboard is not installed; its scalars are not written.")
                return
            self.writer, self.owns_writer = SummaryWriter(str(self.trainer.save_dir)), True
        write_layout(self.writer, levels)

    def close(self) -> None:
        """Close TensorBoard, if it is our own."""
        if self.owns_writer:
            self.writer.close()

    def wants(self, step: int) -> bool:
        """Whether this step's scalars are written: every ``log_interval`` steps."""
        return self.writer is not None and step % self.config.log_interval == 0

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Write scalars; the axis is all steps."""
        write_scalars(self.writer, scalars, step)

    def end_epoch(self) -> None:
        """Write what belongs to a validated epoch; the axis is epochs. Ultralytics' own scalars if it writes none."""
        trainer, metrics, done = self.trainer, dict(self.trainer.metrics or {}), self.trainer.epoch + 1
        if trainer.epoch == self.trained_epoch:  # Ultralytics comes here once more, one epoch on, with best.pt
            self.last_metrics = metrics
            validated = trainer.args.val or done >= trainer.epochs
            if self.writer is not None and MAP in metrics and validated:
                write_scalars(self.writer, {EPOCH_MAP: float(metrics[MAP])}, done)
            self.watch_epoch()
        if self.owns_writer and trainer.tloss is not None:
            host = {**trainer.label_loss_items(trainer.tloss), **metrics, **trainer.lr}
            write_scalars(self.writer, {name: float(value) for name, value in host.items()}, done)

    def watch_epoch(self) -> None:
        """What else belongs to an epoch that was trained."""

    def end_run(self) -> None:
        """Write the run's row of TensorBoard's table; the trainer's ``metrics`` are those of ``best.pt`` then."""
        if self.writer is None:
            return
        trainer, last, best = self.trainer, self.last_metrics, self.trainer.metrics or {}
        host = {**{key: getattr(trainer.args, key) for key in HOST_SETTINGS}, "epochs": trainer.epochs}
        plain = {k: value if isinstance(value, (int, float)) else Path(str(value)).name for k, value in host.items()}
        found = {FINAL_MAP: last.get(MAP), FINAL_MAP50: last.get(MAP50), BEST_MAP: best.get(MAP)}
        metrics = {tag: float(value) for tag, value in found.items() if value is not None}
        write_hyper_parameters(self.writer, hyper_parameters(self.config, **plain), metrics, trainer.epochs)


class TrainingMonitor(RunMonitor):
    """Reports one training that distils; ``boxes_of`` packs the boxes of a collated batch."""

    def __init__(self, trainer: Any, distiller: Distiller, config: FGDConfig, boxes_of: BoxesOf) -> None:
        super().__init__(trainer, config)
        self.distiller = distiller
        self.boxes_of = boxes_of
        self.seen: tuple[Distilled, PackedBoxes] | None = None  # the step to look at
        self.report: Report | None = None  # on the first distilling step, until the epoch ends
        self.patience = PATIENCE
        self.watch: AttentionWatch | None = None

    def open(self, levels: Sequence[str] = ()) -> None:
        """Say what is distilled, and open TensorBoard."""
        self.announce()
        super().open(levels or self.distiller.level_names)
        if self.writer is not None:
            dataset = self.trainer.test_loader.dataset
            self.watch = AttentionWatch(self.distiller, dataset, self.boxes_of, self.config.image_interval)

    def announce(self) -> None:
        """Say in one line what is distilled into what, and what that costs per step of one process."""
        batch = int(self.trainer.batch_size) // max(1, int(self.trainer.world_size))
        try:
            logger.info("FGD: %s.", extra_cost(self.distiller, batch, int(self.trainer.args.imgsz)))
        except Exception as error:  # the line is a service: a teacher that takes no zeros must not end the training
            logger.info("FGD: %s", self.distiller.describe().replace("\n", "\nFGD: "))
            logger.warning("FGD: the cost per step could not be computed: %s", error)

    def see(self, distilled: Distilled, boxes: PackedBoxes) -> None:
        """Note a step before its backward pass, until one was looked at."""
        if self.patience and distilled.weight:
            self.seen = distilled, boxes

    def look(self, stepped_norm: float) -> None:
        """After the first distilling step: say whether all is well.

        A step whose batch has no object, or at which no finite gradient arrived (a gradient scaler's first steps), is
        passed over, ``PATIENCE`` times at most. ``stepped_norm`` is the norm of the parameters' gradient when their
        optimizer stepped; else their gradients are still there.
        """
        if self.seen is None:
            return
        (distilled, boxes), self.seen = self.seen, None
        parameters = list(self.distiller.parameters())
        norm = stepped_norm or gradient_norm(p.grad for p in parameters)
        arrived = 0 < norm < math.inf or not parameters
        self.patience -= 1
        if self.patience and not (len(boxes) and arrived):
            return
        self.patience = 0
        report = first_step(self.distiller, distilled, boxes, norm)
        self.report = report

    def end_training_epoch(self) -> None:
        """Say what was found in the first distilling step: now, since a line earlier would cut the progress bar."""
        self.trained_epoch = self.trainer.epoch
        report, self.report = self.report, None
        if report is not None and not report.troubles:
            names = ", ".join(finding.name for finding in report.findings)
            logger.info("FGD: the first distilling step is well (%s).", names)
        for finding in report.troubles if report is not None else ():
            logger.warning("FGD: %s", finding)

    def end_batch(self, distilled: Distilled | None, task_loss: Tensor | None, stepped_norm: float) -> None:
        """Write the scalars of the last step that distilled."""
        self.look(stepped_norm)
        step = self.distiller.clock.step - 1
        if distilled is None or not self.wants(step):
            return
        scalars = distillation_scalars(self.distiller, distilled, None if task_loss is None else float(task_loss))
        self.write({**scalars, "fgd/adapter_gradient_norm": stepped_norm}, step)

    def watch_epoch(self) -> None:
        """Write the attention distance, and now and then pictures."""
        if self.watch is not None:
            trainer = self.trainer
            student = trainer.ema.ema if trainer.ema else self.distiller.student
            self.watch.write(self.writer, student, trainer.epoch, last=trainer.stop)


class AttentionWatch:
    """Writes the attention distance after epochs, and sheets now and then, to TensorBoard.

    Student means what is validated and saved, the moving average, through the adapters as they are trained so far.
    Nothing of the training is touched: random states, modes, batch statistics and gradients stay as they are. If
    something fails here, it is said once and the training goes on without. Some images of the validation ``dataset``
    are read once and kept.

    The ``interval`` is in epochs from one set of pictures to the next, with a distance for each epoch; 0: no pictures;
    None: as often as :data:`WATCH_STEPS`, :data:`PICTURE_STEPS` and :data:`PICTURE_EPOCHS` say. The first and the last
    epoch have both in any case.
    """

    def __init__(self, distiller: Distiller, dataset: Any, boxes_of: BoxesOf, interval: int | None) -> None:
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
                write_sheets(writer, sheets[: PICTURED * len(self.distiller.pairs)], epoch + 1)
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
        for number, batch in enumerate(self._batches, 1):
            images, boxes = batch["img"].float() / 255, self.boxes_of(batch)
            found += attention_sheets(self.distiller, student, images, boxes, names=[f"validation image {number}"])
        return found


def fixed_batches(dataset: Any, count: int) -> list[Mapping[str, Tensor]]:
    """So many images of an Ultralytics data set, each a batch of its own: evenly spaced, with boxes where there are."""
    labels = getattr(dataset, "labels", [])
    usable = [number for number, label in enumerate(labels) if len(label["bboxes"])] or list(range(len(dataset)))
    count = min(count, len(usable))
    chosen = [usable[number * len(usable) // count] for number in range(count)]
    return [dataset.collate_fn([dataset[number]]) for number in chosen]
