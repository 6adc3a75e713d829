"""Adapters: small trainable modules that bring a student feature to the teacher's number of channels.

An adapter maps (N, C_student, H, W) to (N, C_teacher, H, W):

- ``identity``: the feature as it is; only for equal channels
- ``fitted``: as ``aligned``, and fitted to the teacher's features by ridge regression in the first step that distils
- ``aligned``: a 1x1 convolution that begins by repeating the student's channels, or by taking evenly spaced ones
- ``conv1x1``: a 1x1 convolution, as in the authors' code
- ``conv1x1_bn``: a 1x1 convolution without bias, then batch normalisation
- ``conv3x3``: a 3x3 convolution with padding 1
- ``mlp``: 1x1 convolution, ReLU, 1x1 convolution, at the teacher's width

Register one of your own with::

    @register_adapter("deep")
    def deep(student_channels: int, teacher_channels: int) -> nn.Module: ...

One that has ``wants_fit`` and ``fit(student, teacher)``, as :class:`~fgd_hooks.adapters.FittedConv`, is fitted to the
features of the first batch that is distilled, before it is used.
"""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fgd_hooks.errors import ConfigError
from fgd_hooks.utils.distributed import WORLD, ProcessGroup, all_reduce
from fgd_hooks.utils.linalg import cell_places, chosen_cells, evenly_spaced, ridge_change, wide
from fgd_hooks.utils.registry import Factory, Registry

ADAPTERS = Registry("adapter")


def register_adapter(name: str) -> Callable[[Factory], Factory]:
    """Decorator that registers a factory ``(student_channels, teacher_channels) -> nn.Module`` under ``name``."""
    return ADAPTERS.register(name)


def list_adapters() -> list[str]:
    """Names of all registered adapters."""
    return ADAPTERS.names()


def automatic_adapter(student_channels: int, teacher_channels: int) -> str:
    """What ``"auto"`` stands for: ``identity`` where the channels match and ``fitted`` elsewhere."""
    return "identity" if student_channels == teacher_channels else "fitted"


def create_adapter(name: str, student_channels: int, teacher_channels: int) -> nn.Module:
    """Build the adapter ``name``, or with ``"auto"`` the :func:`automatic_adapter`.

    Raises:
        UnknownNameError: no adapter has that name.
        ValueError: the adapter cannot map these channels.
    """
    if name == "auto":
        name = automatic_adapter(student_channels, teacher_channels)
    adapter: Any = ADAPTERS.create(name, student_channels, teacher_channels)
    if not isinstance(adapter, nn.Module):
        raise ValueError(f"The adapter {name!r} gave a {type(adapter).__name__}; its factory must return an nn.Module.")
    return adapter


@register_adapter("identity")
def identity(student_channels: int, teacher_channels: int) -> nn.Module:
    """The feature as it is.

    Raises:
        ConfigError: the channels differ.
    """
    if student_channels != teacher_channels:
        raise ConfigError(
            f"The adapter 'identity' needs equal channels, but the student has {student_channels} and the teacher "
            f"{teacher_channels}. Use 'auto' or 'conv1x1'."
        )
    return nn.Identity()


SIMPLE: dict[str, Callable[[int, int], nn.Module]] = {
    "aligned": lambda student, teacher: aligned(nn.Conv2d(student, teacher, 1)),
    "conv1x1": lambda student, teacher: nn.Conv2d(student, teacher, 1),
    "conv1x1_bn": lambda s, t: nn.Sequential(nn.Conv2d(s, t, 1, bias=False), nn.BatchNorm2d(t)),
    "conv3x3": lambda student, teacher: nn.Conv2d(student, teacher, 3, padding=1),
    "mlp": lambda s, t: nn.Sequential(nn.Conv2d(s, t, 1), nn.ReLU(inplace=True), nn.Conv2d(t, t, 1)),
}
for _name, _factory in SIMPLE.items():
    register_adapter(_name)(_factory)


def run_adapter(adapter: nn.Module, student: Tensor) -> Tensor:
    """The student's feature (N, C_student, H, W) through its adapter, in a precision that does both good."""
    own, kind = next(adapter.parameters(), None), student.device.type
    autocast = torch.is_autocast_enabled(kind)
    # float16 ends at 65504: a loss scaler's factor would overflow the gradients of the adapter's weights
    narrow = autocast and torch.get_autocast_dtype(kind) is torch.float16
    if own is not None and (narrow or not autocast):
        student = student.to(own.dtype)  # a student that ran under autocast, or in half precision
    with torch.autocast(kind, enabled=False) if narrow else contextlib.nullcontext():
        adapted: Tensor = adapter(student)
    return adapted


@register_adapter("fitted")
class FittedConv(nn.Conv2d):
    """One 1x1 convolution with bias, (N, C_student, H, W) to (N, C_teacher, H, W), that :meth:`fit` sets once.

    Before that, the teacher's channel j is the student's channel j * C_student // C_teacher: in a student that began as
    evenly spaced channels of its teacher the channel that was taken, or its neighbour.

    Attributes:
        fitted: () bool, part of the state: weights that were fitted and trained are not fitted again.
        process_group: the processes that fit together.
    """

    fitted: Tensor
    process_group: ProcessGroup = WORLD

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__(student_channels, teacher_channels, 1)
        self.register_buffer("fitted", torch.tensor(False))
        self._known_fitted = False
        aligned(self)

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
        for each in (count, sums, products):
            all_reduce(each, self.process_group)
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


def aligned(conv: nn.Conv2d) -> nn.Conv2d:
    """A 1x1 convolution, set in place: its output j is its input j * inputs // outputs."""
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[torch.arange(conv.out_channels), evenly_spaced(conv.out_channels, conv.in_channels)] = 1
        nn.init.zeros_(typing.cast(nn.Parameter, conv.bias))
    return conv


def _cells(feature: Tensor) -> Tensor:
    """(cells, C) of a feature map (N, C, H, W), in float64: those of :func:`chosen_cells`, taken before any copy."""
    images, _, height, width = feature.shape
    cells = chosen_cells(images * height * width).to(feature.device)
    image, row, column = cell_places(cells, height, width)
    return wide(feature.detach()[image, :, row, column])
