"""FGD computed step by step, as the authors' training code does: what benchmarks/loss.py measures FGDLoss against.

One Python loop per image and box for the masks, weighted copies of both features for the focal term, two context
blocks of 1x1 convolutions, and autograd for the rest, which keeps about eight feature-sized tensors for the backward
pass. The numbers are those of FGDLoss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgd_hooks.losses.fgd import FGDLoss


class ReferenceFGD(nn.Module):
    """FGD without any optimisation.

    Args:
        loss: the FGDLoss whose weights, temperature and parameter values to take over.
    """

    def __init__(self, loss: FGDLoss) -> None:
        super().__init__()
        channels = loss.channels
        self.temperature = loss.temperature
        self.weights = tuple(loss.weights.values())
        self.attend = nn.ModuleList(nn.Conv2d(channels, 1, 1) for _ in range(2))
        self.transform = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels // 2, 1),
                nn.LayerNorm([channels // 2, 1, 1]),
                nn.ReLU(inplace=True),
                nn.Conv2d(channels // 2, channels, 1),
            )
            for _ in range(2)
        )
        for k, block in enumerate((loss.student_context, loss.teacher_context)):
            wk, *others = (weight.detach() for weight in block.weights())
            self.attend[k].load_state_dict({"weight": wk.view(1, -1, 1, 1), "bias": torch.zeros(1)})
            for mine, theirs in zip(self.transform[k].parameters(), others, strict=True):
                mine.data.copy_(theirs.reshape(mine.shape))

    def forward(self, student: Tensor, teacher: Tensor, boxes: Sequence[Tensor], canvas: tuple[int, int]) -> Tensor:
        """The weighted sum of the four parts; arguments as for FGDLoss."""
        spatial_t, channel_t = self.attentions(teacher)
        spatial_s, channel_s = self.attentions(student)
        foreground, background = self.masks(spatial_t, boxes, canvas)
        alpha, beta, gamma, lambda_ = self.weights
        fg, bg = self.focal(student, teacher, foreground, background, channel_t, spatial_t)
        attention = (channel_s - channel_t).abs().sum() + (spatial_s - spatial_t).abs().sum()
        n = len(boxes)
        relation = F.mse_loss(self.relate(student, 0), self.relate(teacher, 1), reduction="sum") / n
        return alpha * fg + beta * bg + gamma * attention / n + lambda_ * relation

    def attentions(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Spatial (N, H, W) and channel (N, C) attention."""
        n, c, h, w = feature.shape
        size = feature.abs()
        spatial = (h * w * F.softmax((size.mean(1) / self.temperature).view(n, -1), 1)).view(n, h, w)
        channel = c * F.softmax(size.mean(2).mean(2) / self.temperature, 1)
        return spatial, channel

    def masks(self, like: Tensor, boxes: Sequence[Tensor], canvas: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Foreground and background weights, painted box after box."""
        _, height, width = like.shape
        foreground, background = torch.zeros_like(like), torch.ones_like(like)
        for i, of_image in enumerate(boxes):
            left = torch.floor(of_image[:, 0] / canvas[1] * width).int()
            right = torch.ceil(of_image[:, 2] / canvas[1] * width).int()
            top = torch.floor(of_image[:, 1] / canvas[0] * height).int()
            bottom = torch.ceil(of_image[:, 3] / canvas[0] * height).int()
            weight = 1.0 / (bottom + 1 - top) / (right + 1 - left)
            for j in range(len(of_image)):
                rows, columns = slice(top[j], bottom[j] + 1), slice(left[j], right[j] + 1)
                foreground[i, rows, columns] = torch.maximum(foreground[i, rows, columns], weight[j])
            background[i] = torch.where(foreground[i] > 0, 0, 1)
            if torch.sum(background[i]):
                background[i] /= torch.sum(background[i])
        return foreground, background

    def focal(
        self,
        student: Tensor,
        teacher: Tensor,
        foreground: Tensor,
        background: Tensor,
        channel: Tensor,
        spatial: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Both focal terms from weighted copies of the features."""
        channel, spatial = channel[:, :, None, None].sqrt(), spatial[:, None].sqrt()
        weighted = [feature * spatial * channel for feature in (student, teacher)]
        terms = []
        for mask in (foreground, background):
            masked = [feature * mask[:, None].sqrt() for feature in weighted]
            terms.append(F.mse_loss(*masked, reduction="sum") / len(mask))
        return terms[0], terms[1]

    def relate(self, feature: Tensor, which: int) -> Tensor:
        """The feature with its global context added; 0 is the student's block, 1 the teacher's."""
        n, c, h, w = feature.shape
        attention = F.softmax(self.attend[which](feature).view(n, 1, h * w), 2).unsqueeze(-1)
        context = torch.matmul(feature.view(n, 1, c, h * w), attention).view(n, c, 1, 1)
        return feature + self.transform[which](context)
