"""What the callback says when a training starts: one line on what is distilled at what cost, one on its first step."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from torch import nn

from fgd_hooks.cost import extra_cost
from fgd_hooks.distiller import Distilled, Distiller
from fgd_hooks.doctor import first_step, gradient_norm
from fgd_hooks.masks import PackedBoxes

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
