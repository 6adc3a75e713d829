"""FGD with single pieces switched off or exchanged, for ablations: the loss ``fgd_ablation``.

Plain operations, without the fused loss's speed. With nothing switched it is :class:`fgd_hooks.losses.FGDLoss`. The
weights alone switch off whole terms (``beta: 0`` leaves the foreground); what they cannot do is here. Importing this
file registers the loss: a study does so that names it under ``plugins``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fgd_hooks.losses.attention import channel_attention, spatial_attention
from fgd_hooks.losses.base import Targets, register_loss
from fgd_hooks.losses.fgd import FGDLoss
from fgd_hooks.utils.registry import suggestion

SCALES = ("boxes", "image", "none")
RELATIONS = ("gc", "nonlocal", "identity")


class NonLocalBlock(nn.Module):
    """Adds to every cell what all cells say to it: the embedded Gaussian block of arXiv 1711.07971, Eq. 1, 4 and 6.

        R(F)_i = F_i + W_z sum_j softmax_j(theta(F_i) . phi(F_j)) g(F_j)

    theta, phi and g are 1x1 convolutions to C // 2 channels; W_z starts at zero, so R is the identity at first. Time
    and memory grow with the square of the number of cells.

    Args:
        channels: C of the feature map, at least 2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(f"channels must be at least 2, found {channels}.")
        self.theta = nn.Linear(channels, channels // 2)
        self.phi = nn.Linear(channels, channels // 2)
        self.g = nn.Linear(channels, channels // 2)
        self.out = nn.Linear(channels // 2, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, feature: Tensor) -> Tensor:
        """R(F) of ``feature`` (N, C, H, W), same shape, in the type of the feature."""
        cells = feature.flatten(2).transpose(1, 2)
        theta, phi, g = (_linear(layer, cells) for layer in (self.theta, self.phi, self.g))
        attention = torch.softmax(theta @ phi.transpose(1, 2), dim=2)
        added = _linear(self.out, attention @ g)
        return feature + added.transpose(1, 2).reshape(feature.shape)


@register_loss("fgd_ablation")
class AblationLoss(FGDLoss):
    """FGD of one level with pieces switched off or exchanged.

    Args:
        channels: C of both features.
        temperature: T of both attentions.
        alpha: weight of the foreground part.
        beta: weight of the background part.
        gamma: weight of the attention part.
        lambda_: weight of the global part.
        scale: what a cell weighs in the focal parts. "boxes": the paper's scale mask, 1 over the area of the smallest
            box, and 1 over the number of background cells; "image": every foreground cell 1 over the number of
            foreground cells of its image, whatever its box; "none": 1 on either side.
        spatial: multiply the focal parts by the teacher's spatial attention.
        channel: multiply them by the teacher's channel attention.
        relation: block R of the global part: "gc" (the paper's GcBlock), "nonlocal" or "identity" (R(F) = F).

    Raises:
        ValueError: as :class:`FGDLoss`, or no such scale or relation.
    """

    def __init__(
        self,
        channels: int,
        temperature: float = 0.5,
        alpha: float = 1e-3,
        beta: float = 5e-4,
        gamma: float = 5e-4,
        lambda_: float = 5e-6,
        scale: str = "boxes",
        spatial: bool = True,
        channel: bool = True,
        relation: str = "gc",
    ) -> None:
        super().__init__(channels, temperature, alpha, beta, gamma, lambda_, fused=False)
        for key, value, known in (("scale", scale, SCALES), ("relation", relation, RELATIONS)):
            if value not in known:
                raise ValueError(f"{key} is {value!r}. {suggestion(value, known)}")
        self.scale, self.spatial, self.channel = scale, spatial, channel
        if relation == "nonlocal":
            self.student_context = NonLocalBlock(channels)  # type: ignore[assignment]
            self.teacher_context = NonLocalBlock(channels)  # type: ignore[assignment]
        elif relation == "identity":
            self.student_context = nn.Identity()  # type: ignore[assignment]
            self.teacher_context = nn.Identity()  # type: ignore[assignment]

    def terms(self, student: Tensor, teacher: Tensor, targets: Targets) -> list[Tensor]:
        """The four terms of two features (N, C, H, W), () each."""
        weights, s, t = self.weights, student, teacher
        raw = dict.fromkeys(self.part_names, s.sum() * 0)
        if weights["foreground"] or weights["background"]:
            masks, energy = self._masks(targets, s, t), self._energy(s, t)
            raw |= {name: (m * energy).sum() for name, m in zip(raw, masks, strict=False) if weights[name]}
        if weights["attention"]:
            by_cell = (spatial_attention(s, self.temperature) - spatial_attention(t, self.temperature)).abs()
            by_channel = (channel_attention(s, self.temperature) - channel_attention(t, self.temperature)).abs()
            raw["attention"] = by_cell.sum() + by_channel.sum()
        if weights["global"]:
            raw["global"] = (self.teacher_context(t) - self.student_context(s)).square().sum()
        return [term / len(s) for term in raw.values()]

    def _masks(self, targets: Targets, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """What the cells weigh on the foreground and on the background, both (N, H, W)."""
        foreground, background = targets.masks(student, teacher)
        if self.scale == "boxes":
            return foreground, background
        inside = (foreground > 0).to(foreground.dtype)
        if self.scale == "none":
            return inside, 1 - inside
        return inside / inside.sum((1, 2), keepdim=True).clamp(min=1), background

    def _energy(self, s: Tensor, t: Tensor) -> Tensor:
        """The squared difference of each cell, (N, H, W), weighted by the teacher's attentions."""
        square = (t - s).square()
        if self.channel:
            square = square * channel_attention(t, self.temperature)[:, :, None, None]
        energy = square.sum(1)
        return energy * spatial_attention(t, self.temperature) if self.spatial else energy


def _linear(layer: nn.Linear, cells: Tensor) -> Tensor:
    """A layer in the type of its input, as the loss computes in float32 or float64 whatever the host does."""
    return nn.functional.linear(cells, layer.weight.to(cells.dtype), layer.bias.to(cells.dtype))
