"""The weight of the distillation over time: warm-up, constant, linear or cosine, start and stop."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from fgd_hooks.config import FGDConfig, ScheduleConfig, moment

logger = logging.getLogger("fgd_hooks")


@dataclass
class Clock:
    """Where a training is. ``epochs`` (the total) may be None when the loop does not know it.

    Args:
        step: training steps done.
        epoch: epochs done.
        epochs: epochs that the training will have.
    """

    step: int = 0
    epoch: int = 0
    epochs: int | None = None


def next_step(config: FGDConfig, clock: Clock) -> tuple[float, bool]:
    """Count a training step; what its distillation loss is multiplied by, and whether it rests by ``interval``."""
    stop = config.schedule.stop
    if clock.step == 0 and clock.epochs is None and stop not in (None, 1) and not moment(stop)[1]:
        logger.warning(
            "schedule.stop=%s is a fraction of the training: it takes effect once distiller.set_epoch(epoch, epochs) "
            "says how long the training is.",
            stop,
        )
    weight = config.weight * schedule_factor(config.schedule, clock)
    clock.step += 1
    return weight, weight != 0 and (clock.step - 1) % config.interval != 0


def warn_if_idle(config: FGDConfig, epochs: int) -> None:
    """Say so where no epoch of a training of so many will distil."""
    schedule, step = config.schedule, config.schedule.warmup_steps
    if config.weight and not any(schedule_factor(schedule, Clock(step, each, epochs)) for each in range(epochs)):
        logger.warning(
            "No epoch of %d distils with schedule.start=%s and schedule.stop=%s.", epochs, schedule.start, schedule.stop
        )


def schedule_factor(config: ScheduleConfig, clock: Clock) -> float:
    """The factor in [0, 1] by which the distillation loss is multiplied now.

    It is 0 before ``start`` and from ``stop`` on. In between it goes from 1 to ``end`` as ``kind`` says
    (by epoch), and over the first ``warmup_steps`` steps of the training it rises linearly.

    A ``stop`` that is a fraction has no effect while the number of epochs is not known, and is one epoch or more.
    """
    start = _epoch(config.start, clock)
    if start is None:
        raise ValueError(
            f"schedule.start is the fraction {config.start} of the training, whose number of epochs is not known: call "
            'distiller.set_epoch(epoch, epochs) at the start of each epoch, or give epochs, as in "12 epochs".'
        )
    whole = config.stop is None or config.stop == 1
    end = clock.epochs if config.stop is None else _epoch(config.stop, clock)
    if end == 0:
        end = 1  # a small fraction of a short training: rounded to nothing, it would distil nothing
    if clock.epoch < start or (end is not None and not whole and clock.epoch >= end):
        return 0.0
    factor = 1.0
    if config.kind != "constant":
        if end is None:
            raise ValueError(
                f"The schedule {config.kind!r} needs to know how many epochs there are: call "
                "distiller.set_epoch(epoch, epochs) at the start of each epoch, or set schedule.stop."
            )
        progress = (clock.epoch - start) / max(1, end - start)
        shape = 1 - progress if config.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
        factor = config.end + (1 - config.end) * shape
    if config.warmup_steps and clock.step < config.warmup_steps:
        factor *= (clock.step + 1) / config.warmup_steps
    return factor


def _epoch(value: float | str, clock: Clock) -> int | None:
    """A point of the training as an epoch; None for a fraction of a training whose length is not known."""
    number, counts_epochs = moment(value)
    if counts_epochs or number == 0:
        return int(number)
    return None if clock.epochs is None else round(number * clock.epochs)
