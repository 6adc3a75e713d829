"""The norm of a gradient inside a compiled graph, where no hook on a tensor sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fgd_hooks.utils.modules import norm


class NormOfGradient(torch.autograd.Function):
    """The identity; the norm of the gradient that comes back arrives as the gradient of ``meter``, a scalar."""

    @staticmethod
    def forward(ctx: Any, feature: Tensor, meter: Tensor) -> Tensor:
        """The feature itself."""
        return feature.view_as(feature)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The gradient itself, and its norm."""
        return gradient, norm(gradient)


class GradientMeter:
    """The norm of a gradient inside compiled code, taken out in the backward pass.

    Args:
        device: of the gradient.

    Attributes:
        scalar: goes into :class:`NormOfGradient`.
        norm: () of the last backward pass, in memory of its own (that of a CUDA graph is used again); None before.
    """

    def __init__(self, device: torch.device | None) -> None:
        self.scalar = torch.zeros((), device=device, requires_grad=True)
        self.norm: Tensor | None = None
        self.scalar.register_post_accumulate_grad_hook(self._take)

    def _take(self, scalar: Tensor) -> None:
        if scalar.grad is not None:
            self.norm = scalar.grad.detach().clone()
        scalar.grad = None
