"""Start a student as a thinner copy of its teacher: every layer takes evenly spaced channels of the teacher's layer.

::

    print(inherit_channels(student, teacher))  # before the training, and before a moving average of the weights is made

For a student that begins from random weights and has its teacher's architecture, only narrower (YOLO26n of YOLO26s). It
is the uniform selection of Xu et al., "Initializing Models with Larger Ones" (ICLR 2024, arXiv 2311.18823), and carries
the paper's inheriting strategy from necks and heads of equal shape to whole networks of different width. It costs
nothing in training. Layers whose weights have equal shapes become the teacher's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fgd_hooks.initialization.layers import BatchNorm, Unit, is_depthwise, units
from fgd_hooks.initialization.report import Inheritance
from fgd_hooks.teacher import check_apart, check_finite
from fgd_hooks.utils.linalg import evenly_spaced
from fgd_hooks.utils.modules import join, own_tensors, unwrap, write_tensors

Weighted = (nn.Linear, nn.modules.conv._ConvNd)


def is_untrained(model: nn.Module) -> bool:
    """Whether no batch normalisation of the model has seen anything: all means 0, all variances 1.

    False for a model without batch normalisations that keep statistics: nothing is known of it.
    """
    statistics = [(m.running_mean, m.running_var) for m in model.modules() if isinstance(m, BatchNorm)]
    kept = [(mean, variance) for mean, variance in statistics if mean is not None and variance is not None]
    return bool(kept) and all(not mean.any() and bool(torch.all(variance == 1)) for mean, variance in kept)


def inherit_channels(student: nn.Module, teacher: nn.Module, *, least: float = 0.0) -> Inheritance:
    """Copy evenly spaced channels of each of the teacher's layers into the student's layer of that name, in place.

    A convolution or linear layer goes together with the normalisations that follow it, whose statistics are copied,
    too. Kernels must be equally large, and the student's layer at most as wide. A layer without a normalisation (the
    last of a head, say) must have as many outputs as the teacher's, so that a head for other classes stays as it was;
    where it has fewer inputs, its weights grow by that factor, since its sums have fewer terms. Everything is compared
    before the first number is copied. Training modes and requires_grad flags stay as they are.

    Args:
        student: the model that is changed; wrappers are looked through.
        teacher: the model that gives; it is not changed. Its batch normalisations must not be folded in (fused).
        least: nothing is copied where less than this share of the student's parameters would be.

    Raises:
        TeacherError: the teacher is the student, shares its weights or holds NaN.
        ValueError: the student was made in inference mode.
    """
    student, teacher = unwrap(student), unwrap(teacher)
    check_apart(student, teacher)
    check_finite(teacher)
    layers = dict(teacher.named_modules(remove_duplicate=False))
    values: dict[str, Tensor] = {}
    kept: dict[str, str] = {}
    for unit in units(student, ""):
        thinned, reason = _thinned(unit, layers)
        values.update(thinned)
        kept.update(dict.fromkeys(unit.tensors, reason) if reason else {})
    counts = {name: parameter.numel() for name, parameter in student.named_parameters()}
    of = sum(counts.values())
    copied = sum(counts.get(name, 0) for name in values)
    if copied < least * of:
        reason = f"only {copied:,} of {of:,} parameters fit; " + next(iter(kept.values()), "")
        kept, values, copied = dict.fromkeys([*values, *kept], reason), {}, 0
    write_tensors(student, values)
    modules = [(name, name) for name, child in student.named_children() if any(map(own_tensors, child.modules()))]
    return Inheritance({name: name for name in values}, kept, {"network": modules}, copied, of)


def _thinned(unit: Unit, teacher: Mapping[str, nn.Module]) -> tuple[dict[str, Tensor], str]:
    """New values of a unit's tensors, or nothing and the reason."""
    names, reason = unit.counterparts(teacher)
    if reason:
        return {}, reason
    values: dict[str, Tensor] = {}
    for name, layer in unit.layers.items():
        other = teacher[names[name]]
        if reason := _misfit(layer, other, normalised=unit.normalised):
            return {}, f"{name}: {reason}"
        for key, theirs in own_tensors(other).items():
            mine = own_tensors(layer)[key]
            value = theirs.detach()
            for dim, (count, of) in enumerate(zip(mine.shape, theirs.shape, strict=True)):
                if count != of:
                    value = value.index_select(dim, evenly_spaced(count, of).to(value.device))
            if key == "weight" and not unit.normalised and isinstance(layer, Weighted):
                inputs = _input_dim(layer)
                value = value * (theirs.shape[inputs] / mine.shape[inputs])
            values[join(name, key)] = value
    return values, ""


def _misfit(mine: nn.Module, theirs: nn.Module, normalised: bool) -> str:
    """Why a layer cannot take channels of another, or an empty text."""
    weighted, group = isinstance(mine, Weighted), (getattr(mine, "groups", 1), getattr(theirs, "groups", 1))
    if weighted and group != (1, 1) and not (is_depthwise(mine) and is_depthwise(theirs)):
        return f"it has {group[0]} groups, the teacher's {group[1]}"
    for key, tensor in own_tensors(mine).items():
        shape, other = tuple(tensor.shape), tuple(own_tensors(theirs)[key].shape)
        if shape == other:
            continue
        if not (weighted or isinstance(mine, BatchNorm)):
            return f"{key} is {shape}, the teacher's {other}"
        if len(shape) != len(other) or shape[2:] != other[2:] or any(a > b for a, b in zip(shape, other, strict=True)):
            return f"{key} is {shape}, which are no channels of the teacher's {other}"
    if weighted and not normalised:
        output = 1 - _input_dim(mine)
        count, of = (own_tensors(layer)["weight"].shape[output] for layer in (mine, theirs))
        if count != of:
            return f"nothing normalises its outputs, and they are {count}, the teacher's {of}"
    return ""


def _input_dim(layer: nn.Module) -> int:
    return 0 if getattr(layer, "transposed", False) else 1
