"""The fused FGD function for one group of images, forward and backward; fused.py has the formulas."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fgd_hooks.losses.attention import Weights

Blocks = tuple[list[Tensor], list[Tensor]]
"""The weights of the student's and the teacher's context block, each in the order of ``GcBlock.weights``."""


class Group(NamedTuple):
    """Some images of a level, flat."""

    images: slice
    student: Tensor  # (n, C, P)
    teacher: Tensor  # (n, C, P)
    foreground: Tensor  # (n, P)
    background: Tensor  # (n, P)
    chunks: list[slice]  # of channels
    scratch: list[Tensor]  # memory for two pieces, reused by every step and group; empty: allocate as needed

    def read(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """The channels ``chunk`` of both features in the type to compute in."""
        pair = (self.student, self.teacher)
        if len(self.chunks) > 1:
            pair = (self.student[:, chunk], self.teacher[:, chunk])
        return pair[0].to(self.foreground.dtype), pair[1].to(self.foreground.dtype)

    def cast(self) -> Group:
        """The same with both features in the type to compute in, where one piece holds them all anyway."""
        if len(self.chunks) > 1:
            return self
        student, teacher = self.read(self.chunks[0])
        return self._replace(student=student, teacher=teacher)

    def buffer(self, number: int, piece: Tensor) -> Tensor | None:
        """Scratch memory of the shape of ``piece`` (n, c, P) and in its order, to be given as ``out``."""
        if not self.scratch:
            return None
        flat, (n, c, p) = self.scratch[number][: piece.numel()], piece.shape
        return flat.view(n, p, c).transpose(1, 2) if self.student.stride(1) == 1 else flat.view(n, c, p)


class Kept(NamedTuple):
    """What the forward pass of a group finds; None or empty where no term asks for it."""

    spatial: Any  # softmax (n, P) of the teacher's spatial attention
    channel: Any  # softmax (n, C) of the teacher's channel attention
    student: list[Tensor]  # softmaxes of the student's two, and what they are more than the teacher's
    attend: list[Tensor]  # softmaxes (n, 1, P) of the context blocks
    pooled: list[Tensor]  # contexts (n, C)
    mean: list[Tensor]  # [m (n, C)]


class Context(NamedTuple):
    """The gradient of the global term as far as it needs no feature, for some images."""

    scale: Tensor  # -g
    offset: Tensor  # a (n, C)
    by_pooled: tuple[Tensor, ...]  # gradients at both contexts (n, C)
    columns: Tensor  # (n, C, 3): -g a, the gradient at the student's context, its W_k

    def of(self, images: slice) -> Context:
        """The same for fewer images."""
        by_pooled = tuple(each[images] for each in self.by_pooled)
        return Context(self.scale, self.offset[images], by_pooled, self.columns[images])


class Factors(NamedTuple):
    """The incoming gradient of each raw term's sum over the batch, with the constants of its backward pass.

    The attention term has two, for its maps and for its vectors. None where there is no weight.
    """

    foreground: Tensor | None
    background: Tensor | None
    cells: Tensor | None
    channels: Tensor | None
    context: Tensor | None


def forward_group(group: Group, temperature: float, weights: Weights, blocks: Blocks) -> tuple[list[Tensor], Kept]:
    """The first three terms and sum (d - m)^2, summed over a group of images."""
    group = group.cast()
    n, c, p = group.student.shape
    sized = (bool(weights.attention), bool(weights.attention) or weights.focal)
    over_channels: list[Any] = [None, None]
    logits: list[Any] = [None, None]
    over_cells: tuple[list[Tensor], list[Tensor]] = ([], [])
    for j in group.chunks:
        for k, piece in enumerate(group.read(j)):
            if sized[k]:
                size = torch.abs(piece, out=group.buffer(0, piece))
                over_channels[k] = _add(over_channels[k], size.sum(1))
                over_cells[k].append(size.sum(2))
            if weights.context:
                logits[k] = _add(logits[k], torch.bmm(blocks[k][0][:, j].expand(n, 1, -1), piece))
    spatial = _softmaxes([x for x in over_channels if x is not None], 1 / (c * temperature))
    channel = _softmaxes([_join(x) for x in over_cells if x], 1 / (p * temperature))
    attend = [torch.softmax(x, 2) for x in logits if x is not None]

    energy: Any = None
    squares: Any = None
    means: list[Tensor] = []
    contexts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for j in group.chunks if weights.focal or weights.context else ():
        pieces = group.read(j)
        d = torch.sub(pieces[1], pieces[0], out=group.buffer(0, pieces[0]))
        if weights.focal:
            square = torch.mul(d, d, out=group.buffer(1, d))
            energy = _add(energy, torch.bmm(channel[-1][:, None, j], square))
        if weights.context:
            for k, piece in enumerate(pieces):
                contexts[k].append(torch.bmm(attend[k], piece.transpose(1, 2)).squeeze(1))
            means.append(d.mean(2))
            d -= means[-1][:, :, None]
            squares = _add(squares, torch.mul(d, d, out=d).sum())

    terms: list[Any] = [None, None, None, squares]
    if energy is not None:
        energy = energy.squeeze(1).mul_(spatial[-1])
        for k, mask in enumerate((group.foreground, group.background)):
            if weights[k]:
                terms[k] = torch.dot(mask.reshape(-1), energy.view(-1))
    student: list[Tensor] = []
    if weights.attention:
        student = [spatial[0], channel[0], spatial[0] - spatial[1], channel[0] - channel[1]]
        of_cells, of_channels = (torch.linalg.vector_norm(more, 1) for more in student[2:])
        terms[2] = torch.add(of_cells * p, of_channels, alpha=c)
    pooled = [_join(x) for x in contexts if x]
    if None in terms:
        zero = group.foreground.new_zeros(())
        terms = [zero if term is None else term for term in terms]
    return terms, Kept(_last(spatial), _last(channel), student, attend, pooled, [_join(means)] if means else [])


def backward_group(
    group: Group,
    kept: Kept,
    factors: Factors,
    context: Context | None,
    by_student: Tensor | None,
) -> list[Tensor]:
    """Write the student's gradient of a group into ``by_student`` (n, C, P), if that is wanted.

    Returns:
        The gradients at W_k (1, C) of both blocks, or nothing if no gradient flows to the global term.
    """
    group = group.cast()
    into = _StudentGradient(kept.channel, context)
    for factor, mask in ((factors.foreground, group.foreground), (factors.background, group.background)):
        if factor is not None:
            into.focal = mask * factor if into.focal is None else into.focal.addcmul_(mask, factor)
    if into.focal is not None:
        into.focal = into.focal.mul_(kept.spatial)
    if factors.cells is not None and factors.channels is not None:
        cells, channels, *more = kept.student
        into.cells = _sign_gradient(more[0], cells).mul_(factors.cells)
        into.channels = _sign_gradient(more[1], channels).mul_(factors.channels)
    by_logits: list[Tensor] = []
    if context is not None:
        by_attend: list[Any] = [None, None]
        for j in group.chunks:
            for k, piece in enumerate(group.read(j)):
                by_attend[k] = _add(by_attend[k], torch.bmm(context.by_pooled[k][:, None, j], piece))
        by_logits = [
            torch.ops.aten._softmax_backward_data(grad, attend, 2, attend.dtype)
            for grad, attend in zip(by_attend, kept.attend, strict=True)
        ]
        into.rows = torch.cat((torch.ones_like(kept.attend[0]), kept.attend[0], by_logits[0]), 1)
    by_wk: tuple[list[Tensor], list[Tensor]] = ([], [])
    for j in group.chunks:
        pieces = group.read(j)
        for k, grad in enumerate(by_logits):
            by_wk[k].append(torch.bmm(grad, pieces[k].transpose(1, 2)).sum(0))
        if by_student is not None:
            into.write(group, pieces, j, by_student if len(group.chunks) == 1 else by_student[:, j])
    return [_join(each) for each in by_wk if each]


class _StudentGradient:
    """The student feature's gradient, written chunk by chunk from whichever terms there are."""

    def __init__(self, channel: Any, context: Context | None) -> None:
        self.channel = channel  # A_C^t / C (n, C)
        self.context = context
        self.rows: Any = None  # (n, 3, P): 1, p, q; with a context
        self.focal: Any = None  # k (n, P)
        self.cells: Any = None  # u (n, P)
        self.channels: Any = None  # v (n, C); with u

    def write(self, group: Group, pieces: tuple[Tensor, Tensor], j: slice, into: Tensor) -> None:
        """Overwrite ``into`` with the gradient at the channels ``j``."""
        student, teacher = pieces
        context = self.context
        d = torch.sub(teacher, student, out=into) if into.dtype == student.dtype else teacher - student
        if self.focal is not None:
            focal, channel = self.focal[:, None], self.channel[:, j, None]
            factor = torch.mul(channel, focal, out=group.buffer(0, d))
            d *= factor if context is None else factor.add_(context.scale)
        elif context is not None:
            # Without a focal term, the small sum of two large numbers can be formed before it is scaled.
            d.add_(context.offset[:, j, None]).mul_(context.scale)
        else:
            d.zero_()
        if self.cells is not None:
            size = torch.add(self.channels[:, j, None], self.cells[:, None], out=group.buffer(0, d))
            d.addcmul_(torch.sign(student, out=group.buffer(1, d)), size)
        if context is not None:
            first = 1 if self.focal is None else 0
            d.baddbmm_(context.columns[:, j, first:], self.rows[:, first:])
        if d is not into:
            into.copy_(d)


def _softmaxes(logits: list[Tensor], scale: float) -> list[Tensor]:
    """Softmaxes over the last dimension of maps or vectors of one shape, times ``scale``, all in one pass."""
    if not logits:
        return []
    both = torch.stack(logits) if len(logits) > 1 else logits[0][None]
    return list(torch.softmax(both.mul_(scale), 2).unbind())


def _last(each: list[Tensor]) -> Tensor | None:
    return each[-1] if each else None


def _sign_gradient(difference: Tensor, student: Tensor) -> Tensor:
    """Gradient of sum |x - y| at the logits of x, a softmax over the last dimension."""
    gradient: Tensor = torch.ops.aten._softmax_backward_data(difference.sign(), student, 1, student.dtype)
    return gradient


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _join(chunks: list[Tensor]) -> Tensor:
    """Chunks of channels in one tensor (..., C)."""
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, -1)
