"""FGD's four terms in one autograd function that keeps no feature-sized tensor but its inputs.

The straightforward computation saves about eight feature-sized tensors for the backward pass. Here the backward pass
recomputes what it needs from the two features, and both passes walk twice over them, in pieces that fit a CPU's cache
(on a GPU one piece is usually the whole level). With d = F_t - F_s, P = H * W, m = mean_hw d and a = what the
teacher's context block adds to a channel minus what the student's adds:

    E[h,w]  = sum_c A_C^t d^2                    gives both focal terms: sum S A_S^t E and sum B A_S^t E
    global  = sum (d - m)^2 + P sum (m + a)^2    expanding the first square instead would cancel in float32
    dL/dF_s = d (A_C^t k - g) + sign(F_s) (u + v) + [-g a, dL/dcontext, W_k] [1, p, q]

where k and u are maps (H, W), v is a vector (C), g a number, p the context block's attention over the cells and q the
gradient at that attention's logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fgd_hooks.losses.context import LAYER_NORM_EPS

# Elements of a feature handled at once. A group of images stays in the third-level cache between the two walks and
# shares the arithmetic on vectors and maps; a piece of it stays in the second level between two operations.
_CPU_GROUP, _CPU_PIECE = 1 << 20, 1 << 17
_GPU_GROUP, _GPU_PIECE = 1 << 26, 1 << 25

_BLOCK = 7  # tensors of one context block


class Terms(NamedTuple):
    """Which terms to compute; one that is switched off comes back as 0."""

    foreground: bool = True
    background: bool = True
    attention: bool = True
    context: bool = True

    @property
    def focal(self) -> bool:
        """Whether either focal term is wanted."""
        return self.foreground or self.background


def fused_terms(
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    background: Tensor,
    student_block: Sequence[Tensor],
    teacher_block: Sequence[Tensor],
    temperature: float,
    terms: Terms,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The terms foreground, background, attention and global: unweighted, divided by N, each a scalar.

    Exact in value and in the gradients of the student feature and of both blocks; each term may be differentiated on
    its own. There is no second derivative.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W), takes no gradient.
        foreground: (N, H, W) mask S, in the floating type to compute in.
        background: (N, H, W) mask B, likewise.
        student_block: the weights of the student's context block in the order of ``GcBlock.weights``.
        teacher_block: those of the teacher's.
        temperature: T of both attentions.
        terms: what to compute.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _FusedTerms.apply(  # type: ignore[no-untyped-call]
        student, teacher, foreground, background, temperature, terms, *student_block, *teacher_block
    )
    return result


class _FusedTerms(torch.autograd.Function):
    """Arguments and results as in :func:`fused_terms`. In stacked tensors index 0 is the student, 1 the teacher."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        foreground: Tensor,
        background: Tensor,
        temperature: float,
        terms: Terms,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        level = _Level(student, teacher, foreground.dtype)
        n, c, p = level.shape
        blocks = _blocks(weights, level.dtype)
        spatial, channel = level.zeros(2, n, p), level.zeros(2, n, c)
        attend, pooled = level.zeros(2, n, p), level.zeros(2, n, c)
        energy, mean = level.zeros(n, p), level.zeros(n, c)
        fg, bg, at, gl = level.zeros(4).unbind()
        with no_autocast(student.device):
            for group, pieces in level.groups():
                for i, j in pieces:
                    _sum_up(level, i, j, terms, blocks, spatial, channel, attend)
                if terms.focal or terms.attention:
                    for sums, averaged, total in ((spatial, c, p), (channel, p, c)):
                        of_group = sums[:, group]
                        torch.mul(torch.softmax(of_group / (averaged * temperature), -1), total, out=of_group)
                if terms.context:
                    attend[:, group] = torch.softmax(attend[:, group], -1)
                for i, j in pieces:
                    gl += _compare(level, i, j, terms, channel, attend, energy, pooled, mean)
            if terms.focal:
                energy *= spatial[1]
                fg, bg = (
                    torch.dot(mask.reshape(-1), energy.view(-1)) if on else zero
                    for mask, on, zero in ((foreground, terms.foreground, fg), (background, terms.background, bg))
                )
            if terms.attention:
                at = (spatial[0] - spatial[1]).abs_().sum() + (channel[0] - channel[1]).abs_().sum()
            if terms.context:
                shift = mean + _offset(pooled[1], blocks[1])[-1] - _offset(pooled[0], blocks[0])[-1]
                gl = gl + shift.square_().sum() * p
        ctx.save_for_backward(
            student, teacher, foreground, background, spatial, channel, attend, pooled, mean, *weights
        )
        ctx.temperature, ctx.terms = temperature, terms
        ctx.set_materialize_grads(False)
        return fg / n, bg / n, at / n, gl / n

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        student, teacher, foreground, background, spatial, channel, attend, pooled, mean, *weights = ctx.saved_tensors
        level = _Level(student, teacher, foreground.dtype)
        n, c, p = level.shape
        g_fg, g_bg, g_at, g_gl = (g if on else None for g, on in zip(grads, ctx.terms, strict=True))
        part = _StudentGradient(channel[1])
        context = None
        with no_autocast(student.device):
            if g_fg is not None or g_bg is not None:
                weight = sum(g * mask for g, mask in ((g_fg, foreground), (g_bg, background)) if g is not None)
                part.focal = (weight.view(n, p) * spatial[1]).mul_(-2 / n)  # type: ignore[union-attr]
            if g_at is not None:
                g_at = g_at / (n * ctx.temperature)
                part.cells = _sign_gradient(spatial) * (g_at / c)
                part.channels = _sign_gradient(channel) * (g_at / p)
            if g_gl is not None:
                context = _ContextGradient(level, g_gl * (2 / n), mean, pooled, attend, _blocks(weights, level.dtype))
                part.context = context
            if ctx.needs_input_grad[0]:
                part.allocate(student)
            for group, pieces in level.groups():
                if context is not None:
                    for i, j in pieces:
                        context.project(level, i, j)
                    context.finish(group)
                for i, j in pieces:
                    if context is not None:
                        context.add_wk(level, i, j)
                    part.write(level, i, j)
            found = [None] * len(weights) if context is None else context.of_weights()
        return (part.grad, None, None, None, None, None, *found)


class _Level:
    """The two features as (N, C, P), read in pieces, and how to cut them."""

    def __init__(self, student: Tensor, teacher: Tensor, dtype: torch.dtype) -> None:
        self.flat = (student.flatten(2), teacher.flatten(2))
        self.dtype = dtype
        self.shape = self.flat[0].shape
        self.device = student.device

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def read(self, which: int, images: slice, channels: slice) -> Tensor:
        """A piece of the student's (0) or teacher's (1) feature in the type to compute in."""
        return self.flat[which][images, channels].to(self.dtype)

    def groups(self) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
        """Slices of images, each with its pieces: slices of images and of channels."""
        n, c, p = self.shape
        on_cpu = self.device.type == "cpu"
        group = max(1, (_CPU_GROUP if on_cpu else _GPU_GROUP) // (c * p))
        limit = _CPU_PIECE if on_cpu else _GPU_PIECE
        images, channels = max(1, limit // (c * p)), min(c, max(1, limit // p))
        for start in range(0, n, group):
            stop = min(n, start + group)
            pieces = [
                (slice(i, min(stop, i + images)), slice(j, min(c, j + channels)))
                for i in range(start, stop, images)
                for j in range(0, c, channels)
            ]
            yield slice(start, stop), pieces


def _sum_up(
    level: _Level,
    i: slice,
    j: slice,
    terms: Terms,
    blocks: tuple[list[Tensor], list[Tensor]],
    spatial: Tensor,
    channel: Tensor,
    attend: Tensor,
) -> None:
    """First walk forward: add a piece's |F| to the attentions' sums, and its share of the context blocks' logits."""
    for k in (0, 1):
        piece = level.read(k, i, j)
        if terms.attention or (terms.focal and k == 1):
            size = piece.abs()
            spatial[k, i] += size.sum(1)
            channel[k, i, j] = size.sum(2)
        if terms.context:
            attend[k, i] += torch.bmm(blocks[k][0][:, j].expand(len(piece), 1, -1), piece)[:, 0]


def _compare(
    level: _Level,
    i: slice,
    j: slice,
    terms: Terms,
    channel: Tensor,
    attend: Tensor,
    energy: Tensor,
    pooled: Tensor,
    mean: Tensor,
) -> Tensor | float:
    """Second walk forward: add a piece's share of E, pool its contexts, and return its sum (d - m)^2."""
    if not (terms.focal or terms.context):
        return 0.0
    student, teacher = level.read(0, i, j), level.read(1, i, j)
    difference = teacher - student
    if terms.focal:
        energy[i] += torch.bmm(channel[1, i, None, j], difference.square())[:, 0]
    if not terms.context:
        return 0.0
    for k, piece in enumerate((student, teacher)):
        pooled[k, i, j] = torch.bmm(attend[k, i, None], piece.transpose(1, 2))[:, 0]
    of_piece = difference.mean(2)
    mean[i, j] = of_piece
    difference -= of_piece[:, :, None]
    return difference.square_().sum()


class _StudentGradient:
    """Assembles the student feature's gradient piece by piece from the terms that are asked for."""

    def __init__(self, channel: Tensor) -> None:
        self.channel = channel  # A_C^t (N, C)
        self.focal: Tensor | None = None  # k (N, P)
        self.cells: Tensor | None = None  # u (N, P)
        self.channels: Tensor | None = None  # v (N, C)
        self.context: _ContextGradient | None = None
        self.grad: Tensor | None = None
        self.flat: Tensor | None = None

    def allocate(self, student: Tensor) -> None:
        channels_last = student.is_contiguous(memory_format=torch.channels_last) and not student.is_contiguous()
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.grad = torch.empty_like(student, memory_format=layout)
        self.flat = self.grad.flatten(2)

    def write(self, level: _Level, i: slice, j: slice) -> None:
        if self.flat is None:
            return
        student, teacher = level.read(0, i, j), level.read(1, i, j)
        into = self.flat[i, j]
        d = torch.sub(teacher, student, out=into) if into.dtype == level.dtype else teacher - student
        channel = self.channel[i, j, None]
        if self.focal is not None and self.context is not None:
            d *= torch.addcmul(-self.context.scale, channel, self.focal[i, None])
        elif self.focal is not None:
            d *= channel * self.focal[i, None]
        elif self.context is not None:
            d *= -self.context.scale
        else:
            d.zero_()
        if self.cells is not None and self.channels is not None:
            d.addcmul_(student.sign(), self.cells[i, None] + self.channels[i, j, None])
        if self.context is not None:
            d.baddbmm_(self.context.left[i, j], self.context.right[i])
        if d is not into:
            into.copy_(d)


class _ContextGradient:
    """The gradient of the global term by the context blocks and, as rank-3 factors, by the student feature."""

    def __init__(
        self,
        level: _Level,
        scale: Tensor,
        mean: Tensor,
        pooled: Tensor,
        attend: Tensor,
        blocks: tuple[list[Tensor], list[Tensor]],
    ) -> None:
        n, c, p = level.shape
        self.scale, self.attend = scale, attend
        forward = [_offset(pooled[k], blocks[k]) for k in (0, 1)]
        offset = forward[1][-1] - forward[0][-1]
        by_offset = (mean + offset) * (scale * p)
        backward = [
            _offset_backward(sign * by_offset, pooled[k], blocks[k], forward[k]) for k, sign in ((0, -1), (1, 1))
        ]
        self.by_pooled = [grads[0] for grads in backward]
        self.by_weights = [grads[1:] for grads in backward]
        self.by_attend = level.zeros(2, n, p)
        self.by_wk = level.zeros(2, n, c)
        self.left = torch.stack((-scale * offset, self.by_pooled[0], blocks[0][0].expand(n, c)), 2)
        self.right = torch.stack((torch.ones_like(attend[0]), attend[0], self.by_attend[0]), 1)

    def project(self, level: _Level, i: slice, j: slice) -> None:
        """First walk backward: a piece's share of the gradient at the attention over the cells."""
        for k in (0, 1):
            self.by_attend[k, i] += torch.bmm(self.by_pooled[k][i, None, j], level.read(k, i, j))[:, 0]

    def finish(self, group: slice) -> None:
        """From the attention over the cells to its logits."""
        weighted = self.attend[:, group] * self.by_attend[:, group]
        weighted -= self.attend[:, group] * weighted.sum(-1, keepdim=True)
        self.by_attend[:, group] = weighted
        self.right[group, 2] = weighted[0]

    def add_wk(self, level: _Level, i: slice, j: slice) -> None:
        """Second walk backward: a piece's share of the gradient of both W_k."""
        for k in (0, 1):
            self.by_wk[k, i, j] = torch.bmm(self.by_attend[k, i, None], level.read(k, i, j).transpose(1, 2))[:, 0]

    def of_weights(self) -> list[Tensor | None]:
        """The gradients of all weights of both blocks, in the order of the function's arguments."""
        return [g for k in (0, 1) for g in (self.by_wk[k].sum(0, keepdim=True), *self.by_weights[k])]


def _sign_gradient(attention: Tensor) -> Tensor:
    """Gradient of sum |A_s - A_t| at the student's logits; ``attention`` (2, N, L), each row of L sums to L."""
    signed = attention[0] * (attention[0] - attention[1]).sign_()
    return signed.addcmul_(attention[0], signed.mean(-1, keepdim=True), value=-1)


def _offset(pooled: Tensor, block: list[Tensor]) -> tuple[Tensor, ...]:
    """W2 ReLU(LN(W1 pooled)) with all that its backward pass needs; the result comes last."""
    _, w1, b1, ln_weight, ln_bias, w2, b2 = block
    hidden = torch.addmm(b1, pooled, w1.t())
    normed, mean, rstd = torch.native_layer_norm(hidden, ln_weight.shape, ln_weight, ln_bias, LAYER_NORM_EPS)
    active = normed.relu()
    return hidden, mean, rstd, active, torch.addmm(b2, active, w2.t())


def _offset_backward(
    grad: Tensor, pooled: Tensor, block: list[Tensor], forward: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Gradients of :func:`_offset`: by ``pooled``, then by W1, b1, LN weight, LN bias, W2, b2."""
    _, w1, _, ln_weight, ln_bias, w2, _ = block
    hidden, mean, rstd, active, _ = forward
    by_active = torch.mm(grad, w2) * (active > 0)
    by_hidden, by_ln_weight, by_ln_bias = torch.ops.aten.native_layer_norm_backward(
        by_active, hidden, ln_weight.shape, mean, rstd, ln_weight, ln_bias, [True, True, True]
    )
    return (
        torch.mm(by_hidden, w1),
        torch.mm(by_hidden.t(), pooled),
        by_hidden.sum(0),
        by_ln_weight,
        by_ln_bias,
        torch.mm(grad.t(), active),
        grad.sum(0),
    )


def _blocks(weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    cast = [weight.to(dtype) for weight in weights]
    return cast[:_BLOCK], cast[_BLOCK:]


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context without autocast; costs nothing where there is none."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
