"""Squared difference of the features, weighted by how sure the teacher is that a cell holds an object.

The idea is that of Ultralytics' built-in distillation as its guide describes it (docs.ultralytics.com/guides/
knowledge-distillation): an L2 loss on the maps that feed the head, in which cells with high class scores of the teacher
count more. The formula below is this library's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fgd_hooks.losses.attention import compute_dtype, no_autocast
from fgd_hooks.losses.base import FeatureLoss, LossResult, check_features, check_weights, register_loss
from fgd_hooks.masks import Canvas, PackedBoxes


@register_loss("scored")
class ScoredLoss(FeatureLoss):
    """Score-weighted L2.

        p(n, h, w) = max over classes of sigmoid(scores)
        scored = alpha * sum over n, h, w of p * mean over c of (F_t - F_s)^2  /  sum over n, h, w of p

    The boxes play no part; a batch without objects is weighted by what little the teacher sees. Sums are in float32, or
    float64 if a feature is.

    Args:
        channels: C of both features, for a clear error if they have another; None takes any.
        alpha: weight; with ``balance.mode=gradient`` the scale is measured anyway.

    Raises:
        ValueError: a weight that is negative or not finite.
    """

    part_names = ("scored",)
    needs_scores = True

    def __init__(self, channels: int | None = None, alpha: float = 1.0) -> None:
        super().__init__()
        check_weights(alpha=alpha)
        self.channels, self.alpha = channels, alpha

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        boxes: Sequence[Tensor] | PackedBoxes,
        canvas: Canvas | None = None,
        scores: Tensor | None = None,
    ) -> LossResult:
        """The part for one level; arguments as in :meth:`FeatureLoss.forward`.

        Args:
            student: (N, C, H, W).
            teacher: (N, C, H, W).
            boxes: not looked at.
            canvas: not looked at.
            scores: (N, K, H, W) class scores of the teacher before the sigmoid.

        Raises:
            ValueError: features that differ in shape, no scores, or scores of another shape.
        """
        check_features(student, teacher, self.channels)
        size = (student.shape[0], *student.shape[2:])
        if scores is None or scores.dim() != 4 or (scores.shape[0], *scores.shape[2:]) != size:
            found = None if scores is None else tuple(scores.shape)
            raise ValueError(
                f"The teacher's class scores have the shape {found}; expected (N, classes, H, W) with N, H, W = {size}."
            )
        dtype = compute_dtype(student, teacher)
        with no_autocast(student.device):
            sure = scores.detach().to(dtype).sigmoid().amax(1)
            energy = (teacher.detach().to(dtype) - student.to(dtype)).square().mean(1)
            raw = (sure * energy).sum() / sure.sum().clamp(min=torch.finfo(dtype).tiny)
            part = raw * self.alpha
        return LossResult({"scored": part}, {"scored": raw}, part)
