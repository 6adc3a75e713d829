"""Channel-wise distillation (CWD): Shu et al., ICCV 2021, arXiv 2011.13256."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from fgd_hooks.losses.attention import compute_dtype, no_autocast
from fgd_hooks.losses.base import FeatureLoss, LossResult, check_features, register_loss
from fgd_hooks.masks import Canvas, PackedBoxes


@register_loss("cwd")
class ChannelWiseLoss(FeatureLoss):
    """Each channel as a distribution over its cells, compared by the Kullback-Leibler divergence (Eq. 4 and 5).

        p = softmax over (h, w) of F / T
        channelwise = alpha * T^2 / C * sum over c, h, w of p_t * log(p_t / p_s) / N

    The boxes play no part. Sums are in float32, or float64 if a feature is.

    Args:
        channels: C of both features, for a clear error if they have another; None takes any.
        temperature: T; higher looks at more cells of each channel.
        alpha: weight; with ``balance.mode=gradient`` the scale is measured anyway.

    Raises:
        ValueError: a temperature that is not positive, a weight that is negative, or one that is not finite.
    """

    part_names = ("channelwise",)

    def __init__(self, channels: int | None = None, temperature: float = 1.0, alpha: float = 1.0) -> None:
        super().__init__()
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be positive and finite, found {temperature}.")
        if not (math.isfinite(alpha) and alpha >= 0):
            raise ValueError(f"alpha must be 0 or positive, and finite, found {alpha}.")
        self.channels, self.temperature, self.alpha = channels, temperature, alpha

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        boxes: Sequence[Tensor] | PackedBoxes,
        canvas: Canvas | None = None,
    ) -> LossResult:
        """The part for one level; arguments as in :meth:`FeatureLoss.forward`.

        Raises:
            ValueError: features that differ in shape.
        """
        check_features(student, teacher, self.channels)
        dtype = compute_dtype(student, teacher)
        with no_autocast(student.device):
            log_s = (student.to(dtype).flatten(2) / self.temperature).log_softmax(2)
            log_t = (teacher.detach().to(dtype).flatten(2) / self.temperature).log_softmax(2)
            divergence = (log_t.exp() * (log_t - log_s)).sum()
            raw = divergence * self.temperature**2 / (student.shape[1] * student.shape[0])
            part = raw * self.alpha
        return LossResult({"channelwise": part}, {"channelwise": raw}, part)
