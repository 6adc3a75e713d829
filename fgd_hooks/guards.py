"""What keeps a training safe from its distillation: losses not finite, losses that dominate, a pair taken twice."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fgd_hooks.config import FGDConfig
from fgd_hooks.errors import NonFiniteError

logger = logging.getLogger("fgd_hooks")


DOMINANT = 10.0  # times the task's loss


DOMINANT_STEPS = 100  # in a row

IDLE_FROM, IDLE_STEPS = 4, 100  # after the fit


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
        self._kept = torch.tensor([0, 1])  # of the two, what a good step leaves
        self._dominant = torch.zeros((), dtype=torch.long)  # in a row
        self._compared = 0
        self._warned = False
        self._seen: tuple[list[int], list[Tensor]] | None = None

    @property
    def skipped(self) -> int:
        """Steps so far whose distillation loss was not finite and was left out."""
        return int(self._bad[1])

    def count(self, finite: Tensor, trained: Sequence[Tensor] = ()) -> None:
        """Count one distilling step.

        Args:
            finite: (), bool, whether its loss was finite.
            trained: the parameters that some optimizer should step.
        """
        self.steps += 1
        if self.steps in (IDLE_FROM, IDLE_FROM + IDLE_STEPS):
            self._look_at(trained)
        if self._bad.device != finite.device:
            self._bad, self._kept = self._bad.to(finite.device), self._kept.to(finite.device)
        self._bad = torch.where(finite, self._bad * self._kept, self._bad + 1)
        if finite.device.type != "cpu" and self.steps % self.config.max_bad_steps:
            return
        in_a_row, in_all = self._bad.tolist()
        if in_a_row >= self.config.max_bad_steps:
            raise NonFiniteError(
                f"The distillation loss was NaN or infinite for {in_a_row} steps in a row. Look at the teacher's "
                "features on your data, at the precision of the training (amp), and at the learning rate; "
                "max_bad_steps sets the number of steps that are tolerated."
            )
        if in_a_row and (in_a_row == 1 or finite.device.type != "cpu"):
            logger.warning(
                "Distilling step %d: the distillation loss is not finite; the step uses the task's loss alone "
                "(%d so far).",
                self.steps,
                in_all,
            )

    def _look_at(self, trained: Sequence[Tensor]) -> None:
        """Warn where nothing has written into the parameters for :data:`IDLE_STEPS` steps; a GPU waits for it once."""
        if not trained:
            return
        # a version counts what is written in place, but not what a fused optimizer writes
        sizes = [torch.linalg.vector_norm(each.detach()) for each in trained]
        seen, self._seen = self._seen, ([each._version for each in trained], sizes)
        if seen and seen[0] == self._seen[0] and all(map(torch.equal, seen[1], sizes)):
            logger.warning(
                "No optimizer has changed any of the %d parameters of adapters and losses in %d distilling steps, so "
                "they stay as they began: make the optimizer with distiller.param_groups(), before its scheduler.",
                sum(each.numel() for each in trained),
                IDLE_STEPS,
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
    """Keeps gradients that are not finite away from the student, the adapters and the losses in one backward pass.

    All stays on the device: no step waits for it.

    Args:
        trained: parameters whose gradients become 0, all of them, where one value is not finite at the pass's end.
        device: of the losses.

    Attributes:
        finite: () bool, whether the step's loss is; where not, the student gets zeros.
        zero: ().
    """

    def __init__(self, trained: Sequence[Tensor] = (), device: torch.device | None = None) -> None:
        self.trained = trained
        self.zero = torch.zeros((), device=device)
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
        return gradient if self.finite is None else torch.where(self.finite, gradient, self.zero.to(gradient))

    def watch_parameters(self, loss: Tensor) -> None:
        """Clean the parameters' gradients at the end of each backward pass that ``loss`` () is part of."""
        if loss.requires_grad and self.trained:
            loss.register_hook(self._begin)

    def _begin(self, gradient: Tensor) -> None:
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: queue(self._clean))  # behind DDP's own, which hands out the gradients of all ranks

    @torch.no_grad()
    def _clean(self) -> None:
        """One norm over all gradients, instead of a look at each of some dozens of small ones."""
        given = [p.grad for p in self.trained if p.grad is not None and not p.grad.requires_grad]
        for kind in {(grad.device, grad.dtype) for grad in given}:
            grads = [grad for grad in given if (grad.device, grad.dtype) == kind]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            good = torch.linalg.vector_norm(flat, float("inf")) < float("inf")  # NaN stays NaN
            clean = torch.where(good, flat, self.zero.to(flat)).split([grad.numel() for grad in grads])
            torch._foreach_copy_(grads, [new.view(grad.shape) for new, grad in zip(clean, grads, strict=True)])


AT_WORK: weakref.WeakSet[Any] = weakref.WeakSet()
"""The Distillers that are attached."""


def detach_earlier(student: nn.Module, teachers: list[nn.Module]) -> None:
    """Detach a Distiller of this student and one of these teachers, and say so: two would distil the pair twice."""

    def same(one: nn.Module | None, other: nn.Module) -> bool:
        return one is not None and vars(one) is vars(other)  # also through a second face of the module

    for earlier in list(AT_WORK):
        if same(earlier._student(), student) and any(same(a, b) for a in earlier.teachers for b in teachers):
            logger.warning("This student and teacher had a Distiller already; the new one replaces it.")
            earlier.detach()
