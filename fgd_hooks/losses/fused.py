"""FGD's four terms in one autograd function that keeps no feature-sized tensor but its inputs.

The straightforward computation saves about eight feature-sized tensors for the backward pass. Here the backward pass
recomputes what it needs from the two features, and both passes walk twice over them, in pieces that fit a CPU's cache
(on a GPU one piece is usually the whole level). With d = F_t - F_s, P = H * W, m = mean_hw d and a = what the
teacher's context block adds to a channel minus what the student's adds:

    E[h,w]  = sum_c A_C^t d^2                    gives both focal terms: sum S A_S^t E and sum B A_S^t E
    global  = sum (d - m)^2 + P sum (m + a)^2    expanding the first square instead would cancel in float32
    dL/dF_s = d (A_C^t k - g) + sign(F_s) (u + v) + [-g a, dL/dcontext, W_k] [1, p, q]

where k and u are maps (H, W), v is a vector (C), g a number, p the context block's attention over the cells and q the
gradient at that attention's logits. Attentions are kept as plain softmaxes; their factors P and C are numbers that
enter at the end. In every pair the student's comes first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fgd_hooks.losses.attention import Inputs, Weights, no_autocast, plain_terms, unfilled
from fgd_hooks.losses.compiled import AS_THEY_ARE, Choice, Passes
from fgd_hooks.losses.fused_passes import Blocks, Context, Factors, Group
from fgd_hooks.losses.gc_block import transform, transform_backward
from fgd_hooks.masks import to_device

# Elements of a feature handled at once. The images of a group share the arithmetic on vectors and maps; an image above
# the limit is a group of its own and read in chunks of channels.
_CPU_ELEMENTS = 1 << 19
_GPU_ELEMENTS = 1 << 25


def constants(inputs: Inputs) -> Tensor:
    """(4, 5) numbers that are the same in each step.

    What turns sums over the batch into the four raw terms; the weights; and what turns a raw term's incoming gradient
    into the :class:`Factors`, without and with the weights.
    """
    weights, t = inputs.weights, inputs.temperature
    n, c, p = inputs.student.flatten(2).shape
    backward = (-2 * c * p / n, -2 * c * p / n, p / (c * t * n), c / (p * t * n), -2 / n)
    of_factors = (weights[0], weights[1], weights[2], weights[2], weights[3])
    rows = [
        (c * p / n, c * p / n, 1 / n, 1 / n, 0),
        (*weights, 0),
        backward,
        [factor * weight for factor, weight in zip(backward, of_factors, strict=True)],
    ]
    return to_device(torch.tensor(rows, dtype=inputs.foreground.dtype), inputs.foreground.device)


def fused_terms(inputs: Inputs, choice: Choice, scales: Tensor) -> tuple[Tensor, ...]:
    """The weighted sum () of what :func:`plain_terms` computes, those terms weighted (4,), and raw (4,).

    Each may be differentiated on its own. ``choice`` says whether the heavy passes run compiled; ``scales`` are the
    :func:`constants`.
    """
    student, *masked, student_block, teacher_block, temperature, weights = inputs
    blocks = (*student_block, *teacher_block)

    def trial(passes: Passes) -> None:
        own = [each.detach().requires_grad_() for each in (student, *blocks)]
        with torch.enable_grad():
            loss = _FusedTerms.apply(own[0], (temperature, weights, scales, passes), *masked, *own[1:])[0]
            torch.autograd.grad(loss, own, allow_unused=True)

    settings = temperature, weights, scales, choice.passes(student, trial)
    results: tuple[Tensor, ...] = _FusedTerms.apply(student, settings, *masked, *blocks)
    return results


class _FusedTerms(torch.autograd.Function):
    """Of the student's feature, the settings, then teacher, both masks and both blocks' weights: loss, parts, raw."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, settings: tuple[float, Weights, Tensor, Passes], *others: Tensor
    ) -> tuple[Tensor, ...]:
        teacher, foreground, background, *parameters = others
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student, *others)
        ctx.temperature, ctx.weights, ctx.scales, ctx.passes = temperature, weights, scales, passes = settings
        ctx.kept, ctx.transformed, ctx.shift = [], (), None  # vectors and maps, no input and no result among them
        sums: list[Tensor] = []
        with no_autocast(student.device), unfilled():
            blocks = _blocks(parameters, foreground.dtype)
            for group in _groups((student, teacher, foreground, background), passes):
                terms, kept = passes.forward(group, temperature, weights, blocks)
                sums = _add_each(sums, terms)
                ctx.kept.append(kept)
            if weights.context:
                ctx.pooled = [_join([kept.pooled[k] for kept in ctx.kept]) for k in (0, 1)]
                ctx.transformed = [transform(pooled, block) for pooled, block in zip(ctx.pooled, blocks, strict=True)]
                ctx.offset = ctx.transformed[1][-1] - ctx.transformed[0][-1]
                ctx.shift = _join([kept.mean[0] for kept in ctx.kept]) + ctx.offset
                shift = ctx.shift.view(-1)
                sums[3] = torch.add(sums[3], torch.dot(shift, shift), alpha=foreground[0].numel())
            return _weighted(torch.stack(sums) * scales[0, :4], scales)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable_backward(ctx, grads)
        student, teacher, foreground, background, *parameters = ctx.saved_tensors
        by_student = flat = None
        by_parameters: list[Tensor | None] = [None] * len(parameters)
        by_wk: list[Tensor] = []
        with no_autocast(student.device), unfilled():
            if ctx.needs_input_grad[0]:
                by_student = _dense_like(student)
                flat = by_student.flatten(2)
            factors = _factors(grads, ctx.weights, ctx.scales)
            context = None
            if factors.context is not None:
                blocks = _blocks(parameters, foreground.dtype)
                context, by_parameters = _context(ctx, factors.context, foreground[0].numel(), blocks)
            groups = _groups((student, teacher, foreground, background), ctx.passes)
            for kept, group in zip(ctx.kept, groups, strict=True):
                alone = len(ctx.kept) == 1
                of_group = context if alone or context is None else context.of(group.images)
                into = flat if alone or flat is None else flat[group.images]
                found = ctx.passes.backward(group, kept, factors, of_group, into)
                by_wk = _add_each(by_wk, found)
            if by_wk:
                by_parameters[0], by_parameters[len(parameters) // 2] = by_wk
        return (by_student, *[None] * 4, *by_parameters)


def _weighted(raw: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
    """The results for the raw terms (4,)."""
    parts = raw * scales[1, :4]
    return parts.sum(), parts, raw


def _differentiable_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The same gradients with a graph of their own, at the cost of the plain operations."""
    student, teacher, foreground, background, *parameters = ctx.saved_tensors
    blocks = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
    raw = plain_terms(Inputs(student, teacher, foreground, background, *blocks, ctx.temperature, ctx.weights))
    asked = [
        (term, grad)
        for term, grad in zip(_weighted(torch.stack(raw), ctx.scales), grads, strict=True)
        if grad is not None
    ]
    inputs = [tensor for tensor in (student, *parameters) if tensor.requires_grad]
    outputs, incoming = zip(*asked, strict=True)
    found = iter(torch.autograd.grad(outputs, inputs, incoming, create_graph=True, allow_unused=True))
    by_student, *by_parameters = (next(found) if x.requires_grad else None for x in (student, *parameters))
    return (by_student, *[None] * 4, *by_parameters)


def _context(ctx: Any, factor: Tensor, cells: int, blocks: Blocks) -> tuple[Context, list[Tensor | None]]:
    """The global term's gradient before the features, and those of both blocks' weights without W_k (None)."""
    scale = factor
    by_offset = ctx.shift * (scale * cells)
    by_pooled, by_weights = [], []
    for k, grad in enumerate((by_offset, -by_offset)):
        by_context, by_block = transform_backward(grad, ctx.pooled[k], blocks[k], ctx.transformed[k])
        by_pooled.append(by_context)
        by_weights += [None, *by_block]
    columns = torch.stack((ctx.offset * scale, by_pooled[0], blocks[0][0].expand_as(ctx.offset)), 2)
    return Context(scale, ctx.offset, tuple(by_pooled), columns), by_weights


def _groups(maps: Sequence[Tensor], passes: Passes) -> Iterator[Group]:
    """The batch, features (N, C, H, W) and masks (N, H, W), in groups of images of a size that suits the device."""
    flat = [each.flatten(-2) for each in maps]
    (n, c, p), on_cpu = flat[0].shape, flat[0].device.type == "cpu"
    limit = _CPU_ELEMENTS if on_cpu else _GPU_ELEMENTS
    chunks = _cut(c, max(1, limit // p))
    groups = _cut(n, max(1, limit // (c * p)))
    scratch: list[Tensor] = []
    formats = [(each.is_contiguous(), each.transpose(1, 2).is_contiguous()) for each in flat[:2]]
    if passes is AS_THEY_ARE and on_cpu and any(map(all, zip(*formats, strict=True))):
        # Fresh memory for every step costs the CPU more, in page faults, than the step itself.
        of_piece = groups[0].stop * chunks[0].stop * p
        scratch = [flat[2].new_empty(of_piece) for _ in range(2)]
    for images in groups:
        s, t, fg, bg = flat if len(groups) == 1 else (each[images] for each in flat)
        yield Group(images, s, t, fg, bg, chunks, scratch)


def _cut(length: int, limit: int) -> list[slice]:
    """Slices of nearly equal length, none longer than ``limit``."""
    size = -(-length // -(-length // limit))
    return [slice(start, min(length, start + size)) for start in range(0, length, size)]


def _factors(grads: Sequence[Tensor | None], weights: Weights, scales: Tensor) -> Factors:
    """From the gradients at the function's three results to one per raw term."""
    of_loss, of_parts, of_raw = grads
    if of_parts is None and of_raw is None and of_loss is not None:
        each = of_loss * scales[3]
    else:
        total = torch.zeros_like(scales[1, :4]) if of_raw is None else of_raw
        for grad in (of_loss, of_parts):
            total = total if grad is None else total + grad * scales[1, :4]
        each = torch.cat((total[:3], total[2:])) * scales[2]
    wanted = (weights[0], weights[1], weights[2], weights[2], weights[3])
    return Factors(*(factor if weight else None for factor, weight in zip(each.unbind(), wanted, strict=True)))


def _dense_like(feature: Tensor) -> Tensor:
    """An empty tensor whose H and W can be flattened without a copy, channels last where ``feature`` is."""
    channels_last = not feature.is_contiguous() and feature.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(feature, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _blocks(parameters: Sequence[Tensor], dtype: torch.dtype) -> Blocks:
    cast = [parameter.to(dtype) for parameter in parameters]
    return cast[: len(cast) // 2], cast[len(cast) // 2 :]


def _join(groups: list[Tensor]) -> Tensor:
    return groups[0] if len(groups) == 1 else torch.cat(groups)


def _add_each(totals: list[Tensor], parts: list[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(totals, parts, strict=True)] if totals else parts
