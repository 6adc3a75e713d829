"""During an Ultralytics training: how far the student's attention is from the teacher's on a few fixed val images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fgd_hooks.distiller import Distiller
from fgd_hooks.masks import PackedBoxes
from fgd_hooks.monitor import write_scalars, write_sheets
from fgd_hooks.sheets import LevelSheet, attention_distances, attention_sheets
from fgd_hooks.traces import RandomState

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
