"""FGD's attentions, and its four terms from plain differentiable operations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fgd_hooks.losses.gc_block import add_context


class Weights(NamedTuple):
    """The weight of each term; a term of weight 0 is not computed and comes back as 0."""

    foreground: float
    background: float
    attention: float
    context: float

    @property
    def focal(self) -> bool:
        """Whether either focal term is wanted."""
        return bool(self.foreground or self.background)


class Inputs(NamedTuple):
    """What the terms of one level are computed from."""

    student: Tensor  # (N, C, H, W)
    teacher: Tensor  # (N, C, H, W), takes no gradient
    foreground: Tensor  # (N, H, W) mask S, in the floating type to compute in
    background: Tensor  # (N, H, W) mask B, likewise
    student_block: Sequence[Tensor]  # weights of the student's context block in the order of GcBlock.weights
    teacher_block: Sequence[Tensor]  # those of the teacher's
    temperature: float  # T of both attentions
    weights: Weights


def spatial_attention(feature: Tensor, temperature: float = 0.5) -> Tensor:
    """Where a feature map is active (the paper's Eq. 2 and 4): H*W * softmax over the cells of mean_c |F| / T.

    Args:
        feature: (N, C, H, W) of any floating type.
        temperature: T; smaller is sharper.

    Returns:
        (N, H, W), float32 or float64, with mean 1 over the cells of each image.
    """
    with no_autocast(feature.device):
        height, width = feature.shape[2:]
        logits = feature.abs().mean(1, dtype=compute_dtype(feature)).flatten(1) / temperature
        return torch.softmax(logits, 1).mul(height * width).view(-1, height, width)


def channel_attention(feature: Tensor, temperature: float = 0.5) -> Tensor:
    """Which channels of a feature map are active (the paper's Eq. 3 and 5): C * softmax over c of mean_hw |F| / T.

    Args:
        feature: (N, C, H, W) of any floating type.
        temperature: T; smaller is sharper.

    Returns:
        (N, C), float32 or float64, with mean 1 over the channels of each image.
    """
    with no_autocast(feature.device):
        logits = feature.abs().mean((2, 3), dtype=compute_dtype(feature)) / temperature
        return torch.softmax(logits, 1) * feature.shape[1]


def plain_terms(inputs: Inputs) -> list[Tensor]:
    """The terms foreground, background, attention and global before their weights, () each and divided by N."""
    dtype, weights, temperature = inputs.foreground.dtype, inputs.weights, inputs.temperature
    with no_autocast(inputs.student.device):
        s, t = inputs.student.to(dtype), inputs.teacher.detach().to(dtype)
        fg = bg = at = gl = s.sum() * 0
        spatial, channel = spatial_attention(t, temperature), channel_attention(t, temperature)
        if weights.focal:
            energy = spatial * torch.einsum("nchw,nc->nhw", (t - s).square(), channel)
            fg = (inputs.foreground * energy).sum() if weights.foreground else fg
            bg = (inputs.background * energy).sum() if weights.background else bg
        if weights.attention:
            at = (spatial_attention(s, temperature) - spatial).abs().sum()
            at = at + (channel_attention(s, temperature) - channel).abs().sum()
        if weights.context:
            blocks = ([weight.to(dtype) for weight in block] for block in (inputs.student_block, inputs.teacher_block))
            by_student, by_teacher = (add_context(x, block) for x, block in zip((s, t), blocks, strict=True))
            gl = (by_teacher - by_student).square().sum()
        return [term / len(s) for term in (fg, bg, at, gl)]


def compute_dtype(*features: Tensor) -> torch.dtype:
    """The floating type to compute in: float64 if any feature is, else float32."""
    return torch.float64 if any(f.dtype == torch.float64 for f in features) else torch.float32


@contextlib.contextmanager
def unfilled() -> Iterator[None]:
    """A context in which new memory is not filled with NaN, as deterministic mode has it: all of it is written here."""
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fills


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context without autocast; costs nothing where there is none."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
