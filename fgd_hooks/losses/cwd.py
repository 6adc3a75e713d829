"""Channel-wise distillation (CWD): Shu et al., ICCV 2021, arXiv 2011.13256."""

from __future__ import annotations

from torch import Tensor

from fgd_hooks.losses.base import FeatureLoss, Targets, check_temperature, register_loss


@register_loss("cwd")
class CWDLoss(FeatureLoss):
    """Each channel as a distribution over its cells, compared by the Kullback-Leibler divergence (Eq. 4 and 5).

        p = softmax over (h, w) of F / T
        channelwise = alpha * T^2 / C * sum over c, h, w of p_t * log(p_t / p_s) / N

    The boxes play no part.

    Args:
        channels: C of both features, for a clear error if they have another; None takes any.
        temperature: T; higher looks at more cells of each channel.
        alpha: weight; with ``balance.mode=gradient`` the scale is measured anyway.

    Raises:
        ValueError: a temperature that is not positive, a weight that is negative, or one that is not finite.
    """

    part_names = ("channelwise",)

    def __init__(self, channels: int | None = None, temperature: float = 1.0, alpha: float = 1.0) -> None:
        super().__init__(channels, alpha=alpha)
        check_temperature(temperature)
        self.temperature = temperature

    def terms(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """The divergence, (), of two features (N, C, H, W)."""
        log_s = (student.flatten(2) / self.temperature).log_softmax(2)
        log_t = (teacher.flatten(2) / self.temperature).log_softmax(2)
        divergence = (log_t.exp() * (log_t - log_s)).sum()
        return divergence * self.temperature**2 / (student.shape[1] * student.shape[0])
