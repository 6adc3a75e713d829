"""Adapters: small trainable modules that bring a student feature to the teacher's number of channels.

An adapter maps (N, C_student, H, W) to (N, C_teacher, H, W). Register one of your own with::

    @register_adapter("deep")
    def deep(student_channels: int, teacher_channels: int) -> nn.Module: ...

One that has ``wants_fit`` and ``fit(student, teacher)``, as :class:`~fgd_hooks.fitted.FittedConv`, is fitted to the
features of the first batch that is distilled, before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fgd_hooks.fitted import FittedConv, align
from fgd_hooks.registry import Factory, Registry
from fgd_hooks.schema import ConfigError

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
    """The feature as it is; only for equal channels.

    Raises:
        ConfigError: the channels differ.
    """
    if student_channels != teacher_channels:
        raise ConfigError(
            f"The adapter 'identity' needs equal channels, but the student has {student_channels} and the teacher "
            f"{teacher_channels}. Use 'auto' or 'conv1x1'."
        )
    return nn.Identity()


@register_adapter("conv1x1")
def conv1x1(student_channels: int, teacher_channels: int) -> nn.Module:
    """One 1x1 convolution with bias, as in the authors' code."""
    return nn.Conv2d(student_channels, teacher_channels, 1)


@register_adapter("aligned")
def aligned(student_channels: int, teacher_channels: int) -> nn.Module:
    """One 1x1 convolution with bias that begins by repeating the student's channels (or by taking evenly spaced ones).

    The teacher's channel j begins as the student's channel j * C_student // C_teacher.
    """
    conv = nn.Conv2d(student_channels, teacher_channels, 1)
    align(conv)
    return conv


@register_adapter("fitted")
def fitted(student_channels: int, teacher_channels: int) -> nn.Module:
    """As ``aligned``, and fitted to the teacher's features by ridge regression in the first step that distils."""
    return FittedConv(student_channels, teacher_channels)


@register_adapter("conv1x1_bn")
def conv1x1_bn(student_channels: int, teacher_channels: int) -> nn.Module:
    """1x1 convolution without bias, then batch normalisation."""
    return nn.Sequential(nn.Conv2d(student_channels, teacher_channels, 1, bias=False), nn.BatchNorm2d(teacher_channels))


@register_adapter("mlp")
def mlp(student_channels: int, teacher_channels: int) -> nn.Module:
    """1x1 convolution, ReLU, 1x1 convolution, at the teacher's width."""
    return nn.Sequential(
        nn.Conv2d(student_channels, teacher_channels, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(teacher_channels, teacher_channels, 1),
    )


@register_adapter("conv3x3")
def conv3x3(student_channels: int, teacher_channels: int) -> nn.Module:
    """One 3x3 convolution with bias and padding 1."""
    return nn.Conv2d(student_channels, teacher_channels, 3, padding=1)
