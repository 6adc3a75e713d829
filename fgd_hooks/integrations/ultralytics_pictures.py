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
"""So many fixed validation images give the attention distance of each epoch; so many of them are drawn."""


class AttentionWatch:
    """Writes the attention distance of each epoch, and sheets now and then, to TensorBoard.

    Student means what is validated and saved, the moving average, through the adapters as they are trained so far.
    Nothing of the training is touched: random states, modes, batch statistics and gradients stay as they are. If
    something fails here, it is said once and the training goes on without.

    Args:
        distiller: of the training.
        dataset: Ultralytics' validation data set; its images are read once and kept.
        boxes_of: packs the boxes of a collated batch.
        interval: epochs from one set of pictures to the next; 0: none.
    """

    def __init__(
        self, distiller: Distiller, dataset: Any, boxes_of: Callable[[Mapping[str, Tensor]], PackedBoxes], interval: int
    ) -> None:
        self.distiller = distiller
        self.dataset = dataset
        self.boxes_of = boxes_of
        self.interval = interval
        self.failed = False
        self._batches: list[Mapping[str, Tensor]] | None = None

    def write(self, writer: Any, student: nn.Module, epoch: int, *, last: bool = False) -> None:
        """Write what belongs to an epoch, from 0; the axis is the number of epochs done. ``last`` draws in any case."""
        if self.failed:
            return
        drawn = self.interval > 0 and (last or epoch % self.interval == 0)
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
