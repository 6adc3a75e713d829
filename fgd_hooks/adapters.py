"""Adapters: small trainable modules that bring a student feature to the teacher's number of channels.

An adapter maps (N, C_student, H, W) to (N, C_teacher, H, W). Register one of your own with::

    @register_adapter("deep")
    def deep(student_channels: int, teacher_channels: int) -> nn.Module: ...
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fgd_hooks.registry import Factory, Registry
from fgd_hooks.selection import evenly_spaced

ADAPTERS = Registry("adapter")


def register_adapter(name: str) -> Callable[[Factory], Factory]:
    """Decorator that registers a factory ``(student_channels, teacher_channels) -> nn.Module`` under ``name``."""
    return ADAPTERS.register(name)


def list_adapters() -> list[str]:
    """Names of all registered adapters."""
    return ADAPTERS.names()


def automatic_adapter(student_channels: int, teacher_channels: int) -> str:
    """What ``"auto"`` stands for: ``identity`` where the channels match and ``aligned`` elsewhere."""
    return "identity" if student_channels == teacher_channels else "aligned"


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
        ValueError: the channels differ.
    """
    if student_channels != teacher_channels:
        raise ValueError(
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

    The teacher's channel j begins as the student's channel j * C_student // C_teacher. In a student that began as
    evenly spaced channels of its teacher (:mod:`fgd_hooks.selection`) this is the channel that was taken, or its
    neighbour. From another start it is as good as random weights, and the gradient that reaches the student is one of
    its own channels from the first step on.
    """
    conv = nn.Conv2d(student_channels, teacher_channels, 1)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[torch.arange(teacher_channels), evenly_spaced(teacher_channels, student_channels)] = 1
        nn.init.zeros_(typing.cast(nn.Parameter, conv.bias))
    return conv


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
