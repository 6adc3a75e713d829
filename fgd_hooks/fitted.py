"""The adapter that is fitted to the teacher in one step, before anything is distilled through it.

An adapter with other weights than these pulls the student's features in directions of its own until it is trained, and
the gradient that the student gets meanwhile says little about the teacher. That costs a student most that has something
to lose: one that was trained before, or that began as a thinned copy of its teacher.
"""

from __future__ import annotations

import typing

import torch
from torch import Tensor, nn

from fgd_hooks.distributed import is_distributed
from fgd_hooks.selection import evenly_spaced

RIDGE = 0.05
"""Least weight of the regression's prior, as a share of the mean variance of the student's channels."""

MAX_CELLS = 16384
"""As many cells of a batch are enough for any width; more are left out evenly."""


class FittedConv(nn.Conv2d):
    """One 1x1 convolution with bias, (N, C_student, H, W) to (N, C_teacher, H, W), that :meth:`fit` sets once.

    Before that, the teacher's channel j is the student's channel j * C_student // C_teacher: in a student that began as
    evenly spaced channels of its teacher (:mod:`fgd_hooks.selection`) the channel that was taken, or its neighbour.

    Attributes:
        fitted: () bool, part of the state: weights that were fitted and trained are not fitted again.
    """

    fitted: Tensor

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__(student_channels, teacher_channels, 1)
        self.register_buffer("fitted", torch.tensor(False))
        self._known_fitted = False
        align(self)

    def _load_from_state_dict(self, *args: typing.Any, **kwargs: typing.Any) -> None:
        self._known_fitted = False  # the state that is loaded says whether it was fitted
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def wants_fit(self) -> bool:
        """Whether :meth:`fit` has still to come. Waits for the device until it has."""
        if not self._known_fitted:
            self._known_fitted = bool(self.fitted)
        return not self._known_fitted

    @torch.no_grad()
    def fit(self, student: Tensor, teacher: Tensor) -> None:
        """Ridge regression of the teacher's channels on the student's, over the cells of a batch.

        Minimises sum |t - W s - b|² + r |W - W0|² with the weights W0 at hand; r is the number of cells times the mean
        variance of the student's channels times ``max(RIDGE, C_student / cells)``. Where the features hold NaN or
        infinity, nothing changes and the fit waits for another batch. Processes fit to the cells of all of them.

        Args:
            student: (N, C_student, H, W) features.
            teacher: (N, C_teacher, H, W) features of the same size.
        """
        start, s, t = wide(self.weight.flatten(1)), _cells(student), _cells(teacher)
        rest = t - s @ start.t()
        count = s.new_tensor([s.shape[0]])
        both = torch.cat([s, rest], dim=1)
        sums, products = both.sum(0), s.t() @ both
        if is_distributed():
            for each in (count, sums, products):
                torch.distributed.all_reduce(each)
        if not (torch.isfinite(sums).all() and torch.isfinite(products).all()):
            return
        mean = sums / count
        width = s.shape[1]
        covariance = products / count - torch.outer(mean[:width], mean)
        change = ridge_change(covariance[:, :width], covariance[:, width:], count.squeeze())
        self.weight.copy_((start + change.t())[:, :, None, None])
        typing.cast(nn.Parameter, self.bias).copy_(mean[width:] - mean[:width] @ change)
        self.fitted.fill_(True)
        self._known_fitted = True


def ridge_change(gram: Tensor, cross: Tensor, count: Tensor) -> Tensor:
    """The change of a linear map that minimises mean |rest - change x|² + r |change|².

    r is the mean variance of x times ``max(RIDGE, inputs / count)``.

    Args:
        gram: (..., inputs, inputs) covariance of the inputs x.
        cross: (..., inputs, outputs) covariance of the inputs with the rest that is to be explained.
        count: () number of cells.

    Returns:
        (..., inputs, outputs); zero where none can be found, for features that do not vary.
    """
    width = gram.shape[-1]
    ridge = gram.diagonal(dim1=-2, dim2=-1).mean(-1) * torch.clamp(width / count, min=RIDGE)
    change, failed = torch.linalg.solve_ex(gram + ridge[..., None, None] * torch.eye(width).to(gram), cross)
    found = (failed == 0) & torch.isfinite(change).flatten(-2).all(-1)
    return torch.where(found[..., None, None], change, 0)


def align(conv: nn.Conv2d) -> None:
    """Let a 1x1 convolution repeat its input channels (or take evenly spaced ones), in place."""
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[torch.arange(conv.out_channels), evenly_spaced(conv.out_channels, conv.in_channels)] = 1
        nn.init.zeros_(typing.cast(nn.Parameter, conv.bias))


def _cells(feature: Tensor) -> Tensor:
    """(cells, C) of a feature map (N, C, H, W), at most :data:`MAX_CELLS`, in float64."""
    cells = feature.detach().movedim(1, -1).flatten(0, -2)
    cells = cells[:: max(1, -(-cells.shape[0] // MAX_CELLS))]
    return wide(cells)


def wide(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none (MPS)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
