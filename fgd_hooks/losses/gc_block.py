"""The global context block of the paper's Eq. 12 (GcBlock, from GCNet)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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

    def forward(self, feature: Tensor) -> Tensor:
        """R(F) of ``feature`` (N, C, H, W), same shape and type."""
        return add_context(feature, [weight.to(feature.dtype) for weight in self.weights()])

    def weights(self) -> tuple[Tensor, ...]:
        """W_k, W1, b1, LN weight, LN bias, W2, b2: the order that the fused loss expects."""
        reduce, norm, expand = self.reduce, self.norm, self.expand
        return (self.attend.weight, reduce.weight, reduce.bias, norm.weight, norm.bias, expand.weight, expand.bias)


def add_context(feature: Tensor, block: Sequence[Tensor]) -> Tensor:
    """R(F) of ``feature`` (N, C, H, W) for the weights in the order of :meth:`GcBlock.weights`."""
    return feature + transform(pool(feature, block[0]), block)[-1][:, :, None, None]


def pool(feature: Tensor, wk: Tensor) -> Tensor:
    """The context (N, C): the mean of ``feature`` (N, C, H, W) over its cells, weighted by softmax_hw(W_k F)."""
    flat = feature.flatten(2)
    attention = torch.softmax(torch.matmul(wk, flat), dim=-1)
    return torch.matmul(flat, attention.transpose(1, 2)).squeeze(2)


def transform(pooled: Tensor, block: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """W2 ReLU(LN(W1 x)) of a context x (N, C): first what the backward pass needs, last the result (N, C)."""
    _, w1, b1, ln_weight, ln_bias, w2, b2 = block
    hidden = torch.addmm(b1, pooled, w1.t())
    normed, mean, rstd = torch.native_layer_norm(hidden, ln_weight.shape, ln_weight, ln_bias, LAYER_NORM_EPS)
    active = normed.relu()
    return hidden, mean, rstd, active, torch.addmm(b2, active, w2.t())


def transform_backward(
    grad: Tensor, pooled: Tensor, block: Sequence[Tensor], kept: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """For the gradient at the result (N, C), and what :func:`transform` took and returned: the gradient at x (N, C).

    And those at W1, b1, LN weight, LN bias, W2, b2.
    """
    _, w1, _, ln_weight, ln_bias, w2, _ = block
    hidden, mean, rstd, active, _ = kept
    by_normed = torch.ops.aten.threshold_backward(torch.mm(grad, w2), active, 0)
    by_hidden, by_ln_weight, by_ln_bias = torch.ops.aten.native_layer_norm_backward(
        by_normed, hidden, ln_weight.shape, mean, rstd, ln_weight, ln_bias, [True, True, True]
    )
    by_w1, by_w2 = torch.mm(by_hidden.t(), pooled), torch.mm(grad.t(), active)
    return torch.mm(by_hidden, w1), [by_w1, by_hidden.sum(0), by_ln_weight, by_ln_bias, by_w2, grad.sum(0)]
