"""What keeps a long training safe from its distillation: losses that are not finite, and losses that dominate."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from fgd_hooks.config import FGDConfig
from fgd_hooks.errors import NonFiniteError

logger = logging.getLogger("fgd_hooks")


DOMINANT = 10.0  # times the task's loss


DOMINANT_STEPS = 100  # in a row


class StepHealth:
    """Counts the steps whose distillation loss is not finite, and those in which it dominates the task's loss.

    The counters stay on the device of the losses. Reading them makes a GPU wait, so there they are read now and then
    only; on a CPU after every step.

    Args:
        config: of the distillation; ``max_bad_steps`` is the number of steps in a row that are tolerated.
    """

    def __init__(self, config: FGDConfig) -> None:
        self.config = config
        self.steps = 0
        self._bad = torch.zeros(2, dtype=torch.long)  # in a row, in all
        self._dominant = torch.zeros((), dtype=torch.long)  # in a row
        self._compared = 0
        self._warned = False

    @property
    def skipped(self) -> int:
        """Steps so far whose distillation loss was not finite and was left out."""
        return int(self._bad[1])

    def count(self, finite: Tensor) -> None:
        """Count one distilling step.

        Args:
            finite: (), bool, whether its loss was finite.
        """
        self.steps += 1
        bad = (~finite).long()
        self._bad = torch.stack([(self._bad[0].to(bad) + 1) * bad, self._bad[1].to(bad) + bad])
        if bad.device.type != "cpu" and self.steps % self.config.max_bad_steps:
            return
        in_a_row, in_all = self._bad.tolist()
        if in_a_row >= self.config.max_bad_steps:
            raise NonFiniteError(
                f"The distillation loss was NaN or infinite for {in_a_row} steps in a row. Look at the teacher's "
                "features on your data, at the precision of the training (amp), and at the learning rate; "
                "max_bad_steps sets the number of steps that are tolerated."
            )
        if in_a_row and (in_a_row == 1 or bad.device.type != "cpu"):
            logger.warning(
                "Distilling step %d: the distillation loss is not finite; the step uses the task's loss alone "
                "(%d so far).",
                self.steps,
                in_all,
            )

    def compare(self, distillation: Tensor, task: Tensor) -> None:
        """Warn, once, when the distillation loss was more than 10 times the task's for 100 steps in a row.

        Args:
            distillation: () the loss that is added to the task's.
            task: () the task's loss, in the same unit.
        """
        if self._warned:
            return
        dominant = distillation.detach() > DOMINANT * task.detach().abs().to(distillation.device)
        self._dominant = (self._dominant.to(dominant.device) + 1) * dominant
        self._compared += 1
        if self._compared % DOMINANT_STEPS or int(self._dominant) < DOMINANT_STEPS:
            return
        self._warned = True
        fixed = self.config.balance.mode == "fixed"
        knob = f"weight ({self.config.weight:g})" if fixed else f"balance.ratio ({self.config.balance.ratio:g})"
        other = ", or let balance.mode=gradient measure the scale" if fixed else ""
        logger.warning(
            "For %d steps the distillation loss (now %.3g) has been more than %g times the task's (%.3g): the student "
            "learns the teacher's features rather than its task. Lower %s%s.",
            int(self._dominant),
            float(distillation.detach()),
            DOMINANT,
            float(task.detach()),
            knob,
            other,
        )


class GradientGuard:
    """Keeps the gradient of a step's loss away from the student when that loss is not finite.

    The flag stays on the device: no step waits for it.
    """

    def __init__(self) -> None:
        self.finite: Tensor | None = None

    def watch(self, feature: Tensor) -> Tensor:
        """The same feature (N, C, H, W), with the guard on the way back."""
        if not feature.requires_grad:
            return feature
        feature = feature.view_as(feature)
        feature.register_hook(self)
        return feature

    def __call__(self, gradient: Tensor) -> Tensor:
        """The gradient, or zeros when the loss turned out not to be finite."""
        if self.finite is None:
            return gradient
        return torch.where(self.finite, gradient, torch.zeros_like(gradient))


def zero_unless_finite(gradient: Tensor | None) -> Tensor | None:
    """Gradient hook of adapters and context blocks (None for one whose part has the weight 0)."""
    if gradient is None:
        return None
    largest = torch.linalg.vector_norm(gradient, float("inf"))  # NaN stays NaN; three launches instead of seven in all
    return torch.where(largest < float("inf"), gradient, 0.0)
