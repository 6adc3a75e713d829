"""Masked generative distillation (MGD): Yang et al., ECCV 2022, arXiv 2205.01529."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fgd_hooks.losses.base import FeatureLoss, Targets, register_loss


@register_loss("mgd")
class MGDLoss(FeatureLoss):
    """The student's feature with random cells blanked has to generate the teacher's whole one (Eq. 3 and 4).

        M(h, w) = 0 with probability ``masked``, else 1, for each image anew
        generation = alpha * sum (F_t - G(F_s * M))^2 / N,  G = conv3x3 - ReLU - conv3x3, trained along

    The mask is drawn from a random generator of its own, which starts at torch's initial seed; the training's random
    numbers stay as they are. The boxes play no part.

    Args:
        channels: C of both features.
        masked: fraction of the cells that is blanked; the paper takes 0.65 for one-stage and 0.45 for two-stage
            detectors.
        alpha: weight; the paper takes 2e-5 for one-stage and 5e-7 for two-stage detectors. With
            ``balance.mode=gradient`` it is measured.

    Raises:
        ValueError: a fraction outside [0, 1), or a weight that is negative or not finite.
    """

    part_names = ("generation",)

    def __init__(self, channels: int, masked: float = 0.65, alpha: float = 2e-5) -> None:
        super().__init__(channels, alpha=alpha)
        if not 0 <= masked < 1:
            raise ValueError(f"masked must be a fraction from 0 to below 1, found {masked}.")
        self.masked = masked
        self.generation = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )
        self._random: torch.Generator | None = None

    def terms(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """The squared difference, (), of the teacher's feature (N, C, H, W) and the generated one."""
        own = next(self.generation.parameters()).dtype
        generated: Tensor = self.generation(student.to(own) * self.mask(student).to(own))
        return (teacher - generated.to(teacher)).square().sum() / student.shape[0]

    def mask(self, feature: Tensor) -> Tensor:
        """(N, 1, H, W), bool: the cells of ``feature`` (N, C, H, W) that are kept, drawn anew in each call."""
        if self._random is None or self._random.device != feature.device:
            self._random = torch.Generator(feature.device).manual_seed(torch.initial_seed() % 2**63)
        shape = (feature.shape[0], 1, *feature.shape[2:])
        return torch.rand(shape, generator=self._random, device=feature.device) >= self.masked
