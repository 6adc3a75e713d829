"""Plain feature imitation, the baseline of the FGD paper (Eq. 1 and Table 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from fgd_hooks.losses.base import FeatureLoss, Targets, register_loss


@register_loss("imitation")
class ImitationLoss(FeatureLoss):
    """Squared difference of the features, over all cells or apart on foreground and background.

        mode "all":    imitation  = alpha * sum (F_t - F_s)^2 / N
        mode "split":  foreground = alpha * sum over cells inside a box of (F_t - F_s)^2 / N
                       background = beta  * sum over all other cells of (F_t - F_s)^2 / N

    The paper's Eq. 1 divides by C*H*W; here the sum is divided by the batch size N alone, as in FGD, so that weights
    of both losses compare: an ``alpha`` of 1 / (C*H*W) is Eq. 1. A cell is foreground if any box covers it, by the
    same rounding as in FGD; no cell weighs more than another. Of the paper's Table 1, foreground alone is ``beta=0``,
    background alone is ``alpha=0``. A weight of 0 makes that part 0. Mode "all" ignores the boxes.

    Args:
        channels: C of both features, for a clear error if they have another; None takes any.
        mode: "all" or "split".
        alpha: weight of all cells, or of the foreground.
        beta: weight of the background in mode "split"; unused in mode "all".

    Raises:
        ValueError: an unknown mode, or a weight that is negative or not finite.
    """

    def __init__(self, channels: int | None = None, mode: str = "all", alpha: float = 5e-6, beta: float = 5e-6) -> None:
        super().__init__(channels, alpha=alpha, beta=beta)
        if mode not in ("all", "split"):
            raise ValueError(f"mode must be 'all' or 'split', found {mode!r}.")
        self.mode = mode
        self.part_names = ("imitation",) if mode == "all" else ("foreground", "background")

    def terms(self, student: Tensor, teacher: Tensor, targets: Targets) -> list[Tensor]:
        """The sums, () each, of the squared difference of two features (N, C, H, W)."""
        square = (teacher - student).square()
        if self.mode == "all":
            sums = [square.sum()]
        else:
            energy, inside = square.sum(1), targets.masks(student, teacher)[0] > 0
            sums = [torch.where(inside, energy, 0).sum(), torch.where(inside, 0, energy).sum()]
        weighted = zip(sums, self.weights.values(), strict=True)
        return [value / len(student) if weight else value.new_zeros(()) for value, weight in weighted]
