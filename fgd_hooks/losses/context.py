"""The global context block of the paper's Eq. 12 (GcBlock, from GCNet)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-5


class GcBlock(nn.Module):
    """Adds to a feature map what its attention-weighted mean says about each channel.

        R(F) = F + W2 ReLU(LN(W1 sum_hw softmax_hw(W_k F) F))

    The last layer starts at zero, so R is the identity at first. W_k has no bias: a constant cancels in the softmax.
    The 1x1 convolutions act on one vector per image and are therefore linear layers.

    Args:
        channels: C of the feature map, at least 2; the bottleneck has C // 2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(f"channels must be at least 2, found {channels}.")
        hidden = channels // 2
        self.channels = channels
        self.attend = nn.Linear(channels, 1, bias=False)
        self.reduce = nn.Linear(channels, hidden)
        self.norm = nn.LayerNorm(hidden, eps=LAYER_NORM_EPS)
        self.expand = nn.Linear(hidden, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming (fan in) for W_k, zero for W2, PyTorch's own for the rest."""
        self.reduce.reset_parameters()
        self.norm.reset_parameters()
        nn.init.kaiming_normal_(self.attend.weight, mode="fan_in")
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def pool(self, feature: Tensor) -> Tensor:
        """The attention-weighted mean of ``feature`` (N, C, H, W) over its cells -> (N, C)."""
        flat = feature.flatten(2)
        weights = torch.softmax(torch.matmul(self.attend.weight.to(flat.dtype), flat), dim=-1)
        return torch.matmul(flat, weights.transpose(1, 2)).squeeze(2)

    def offset(self, feature: Tensor) -> Tensor:
        """What R adds to each channel of ``feature`` (N, C, H, W) -> (N, C)."""
        _, w1, b1, ln_weight, ln_bias, w2, b2 = (weight.to(feature.dtype) for weight in self.weights())
        hidden = F.layer_norm(F.linear(self.pool(feature), w1, b1), ln_weight.shape, ln_weight, ln_bias, LAYER_NORM_EPS)
        return F.linear(hidden.relu(), w2, b2)

    def forward(self, feature: Tensor) -> Tensor:
        """R(F) of ``feature`` (N, C, H, W), same shape."""
        return feature + self.offset(feature)[:, :, None, None]

    def weights(self) -> tuple[Tensor, ...]:
        """W_k, W1, b1, LN weight, LN bias, W2, b2: the order that the fused loss expects."""
        return (
            self.attend.weight,
            self.reduce.weight,
            self.reduce.bias,
            self.norm.weight,
            self.norm.bias,
            self.expand.weight,
            self.expand.bias,
        )
