"""Plain feature imitation, the baseline of the FGD paper (Eq. 1 and Table 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fgd_hooks.losses.attention import compute_dtype, no_autocast
from fgd_hooks.losses.base import FeatureLoss, LossResult, check_features, check_weights, pack_boxes, register_loss
from fgd_hooks.masks import Canvas, PackedBoxes, box_masks


@register_loss("imitation")
class ImitationLoss(FeatureLoss):
    """Squared difference of the features, over all cells or apart on foreground and background.

        mode "all":    imitation  = alpha * sum (F_t - F_s)^2 / N
        mode "split":  foreground = alpha * sum over cells inside a box of (F_t - F_s)^2 / N
                       background = beta  * sum over all other cells of (F_t - F_s)^2 / N

    The paper's Eq. 1 divides by C*H*W; here the sum is divided by the batch size N alone, as in FGD, so that weights
    of both losses compare: an ``alpha`` of 1 / (C*H*W) is Eq. 1. A cell is foreground if any box covers it, by the
    same rounding as in FGD; no cell weighs more than another. Of the paper's Table 1, foreground alone is ``beta=0``,
    background alone is ``alpha=0``.

    A weight of 0 makes that part 0. Sums are in float32, or float64 if a feature is.

    Args:
        channels: C of both features, for a clear error if they have another; None takes any.
        mode: "all" or "split".
        alpha: weight of all cells, or of the foreground.
        beta: weight of the background in mode "split"; unused in mode "all".

    Raises:
        ValueError: an unknown mode, or a weight that is negative or not finite.
    """

    def __init__(self, channels: int | None = None, mode: str = "all", alpha: float = 5e-6, beta: float = 5e-6) -> None:
        super().__init__()
        if mode not in ("all", "split"):
            raise ValueError(f"mode must be 'all' or 'split', found {mode!r}.")
        check_weights(alpha=alpha, beta=beta)
        self.channels = channels
        self.mode = mode
        self.alpha, self.beta = alpha, beta
        self.part_names = ("imitation",) if mode == "all" else ("foreground", "background")

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        boxes: Sequence[Tensor] | PackedBoxes,
        canvas: Canvas | None = None,
    ) -> LossResult:
        """The parts for one level; arguments as in :meth:`FeatureLoss.forward`. Mode "all" ignores the boxes.

        Raises:
            ValueError: features that differ in shape, boxes of another number of images.
        """
        check_features(student, teacher, self.channels)
        n, _, height, width = student.shape
        dtype = compute_dtype(student, teacher)
        with no_autocast(student.device):
            difference = teacher.detach().to(dtype) - student.to(dtype)
            if self.mode == "all":
                raw = {"imitation": difference.square().sum() / n}
            else:
                energy = difference.square().sum(1)
                scale, _ = box_masks(pack_boxes(boxes, canvas, student), height, width, dtype)
                inside = scale > 0
                raw = {
                    "foreground": torch.where(inside, energy, 0).sum() / n,
                    "background": torch.where(inside, 0, energy).sum() / n,
                }
            weights = dict(zip(self.part_names, (self.alpha, self.beta), strict=False))
            raw = {name: value if weights[name] else value.new_zeros(()) for name, value in raw.items()}
            parts = {name: value * weights[name] for name, value in raw.items()}
            total = torch.stack(tuple(parts.values())).sum()
        return LossResult(parts, raw, total)
