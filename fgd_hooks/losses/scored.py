"""Squared difference of the features, weighted by how sure the teacher is that a cell holds an object.

The idea is that of Ultralytics' built-in distillation as its guide describes it (docs.ultralytics.com/guides/
knowledge-distillation): an L2 loss on the maps that feed the head, in which cells with high class scores of the teacher
count more. The formula below is this library's own.
"""

from __future__ import annotations

import typing

import torch
from torch import Tensor

from fgd_hooks.losses.base import FeatureLoss, Targets, register_loss


@register_loss("scored")
class ScoredLoss(FeatureLoss):
    """Score-weighted L2.

        p(n, h, w) = max over classes of sigmoid(scores)
        scored = alpha * sum over n, h, w of p * mean over c of (F_t - F_s)^2  /  sum over n, h, w of p

    The boxes play no part; a batch without objects is weighted by what little the teacher sees.

    Args:
        channels: C of both features, for a clear error if they have another; None takes any.
        alpha: weight; with ``balance.mode=gradient`` the scale is measured anyway.

    Raises:
        ValueError: a weight that is negative or not finite.
    """

    part_names = ("scored",)
    needs_scores = True

    def __init__(self, channels: int | None = None, alpha: float = 1.0) -> None:
        super().__init__(channels, alpha=alpha)

    def terms(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """The weighted mean, (), of the squared difference of two features (N, C, H, W)."""
        scores = typing.cast(Tensor, targets.scores)
        sure = scores.detach().to(student).sigmoid().amax(1)
        energy = (teacher - student).square().mean(1)
        return (sure * energy).sum() / sure.sum().clamp(min=torch.finfo(sure.dtype).tiny)
