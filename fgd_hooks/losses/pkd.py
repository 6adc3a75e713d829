"""Distillation by Pearson correlation (PKD): Cao et al., NeurIPS 2022, arXiv 2207.02039."""

from __future__ import annotations

from torch import Tensor

from fgd_hooks.losses.base import FeatureLoss, Targets, register_loss

_EPSILON = 1e-6


@register_loss("pkd")
class PKDLoss(FeatureLoss):
    """Squared difference of features that are normalised channel by channel (Eq. 3): 1 minus their correlation.

        hat(F) = (F - mean) / (std + 1e-6), both over the batch and all cells of a channel
        pearson = alpha * sum (hat(F_t) - hat(F_s))^2 / (2 * N * C * H * W)

    Scale and offset of a channel do not matter, so it lends itself to teachers of another family. The std is that of
    a sample (divided by n - 1); a channel that is constant counts as 0. The boxes play no part.

    Args:
        channels: C of both features, for a clear error if they have another; None takes any.
        alpha: weight; the paper takes 6 for two-stage and 10 for one-stage detectors. With ``balance.mode=gradient``
            it is measured.

    Raises:
        ValueError: a weight that is negative or not finite.
    """

    part_names = ("pearson",)

    def __init__(self, channels: int | None = None, alpha: float = 6.0) -> None:
        super().__init__(channels, alpha=alpha)

    def terms(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Half the mean square, (), between two features (N, C, H, W) after normalising."""
        return (_normalised(teacher) - _normalised(student)).square().mean() / 2


def _normalised(feature: Tensor) -> Tensor:
    """Each channel of (N, C, H, W) with mean 0 and standard deviation 1 over batch and cells."""
    dims, count = (0, 2, 3), feature.numel() // feature.shape[1]
    centred = feature - feature.mean(dims, keepdim=True)
    # the epsilon under the root keeps the gradient of a constant channel finite
    variance = centred.square().sum(dims, keepdim=True) / max(1, count - 1)
    return centred / ((variance + _EPSILON**2).sqrt() + _EPSILON)
