"""The inheriting strategy: start the student from the teacher's neck and head, wherever their weights have one shape.

::

    print(inherit(student, teacher=teacher))  # before the training, and before a moving average of the weights is made

A student whose neck is as wide as its teacher's (a ResNet-50 and a ResNet-101 detector, say) can take over all of it,
which the paper calls the inheriting strategy. Between models of different width little fits, and the report says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fgd_hooks.initialization.layers import checked, take_over, units
from fgd_hooks.initialization.neck_head import Parts, named_parts
from fgd_hooks.initialization.report import InitializationReport
from fgd_hooks.utils.modules import has_tensors

MATCHES = ("auto", "name", "order")


def inherit(
    student: nn.Module,
    *,
    teacher: nn.Module,
    parts: str | Parts = "neck+head",
    match: str = "auto",
    teacher_parts: Parts | None = None,
    example: Any = None,
) -> InitializationReport:
    """Copy the teacher's weights into the student's neck and head, in place, where their shapes are equal.

    A layer is copied as a whole or not at all, and a normalisation only together with the layer before it. Everything
    is compared before the first number is copied. Training modes and requires_grad flags stay as they are.

    Args:
        student: the model that is changed; wrappers are looked through.
        teacher: the model that gives; it is not changed. Its batch normalisations must not be folded in (fused).
        parts: "neck", "head" or "neck+head", found by a probe (see :func:`find_parts`); or the names of the modules of
            each part, ``{"neck": ["backbone.fpn"], "head": ["head"]}``.
        match: "name": modules and layers of equal names; "order": a part's first module with the teacher's first and
            so on, the layers inside by name; "auto": by name where both have modules of the same names, else in order.
        teacher_parts: the teacher's modules, where ``parts`` names modules and its own are called otherwise.
        example: what both models are called with in the probe; None: zeros of 256 x 256 pixels.

    Raises:
        TeacherError: the teacher is the student, shares its weights or holds NaN.
        TapError: parts are to be found, but a model's levels are not.
        ValueError: an unknown part, match or module, a part that cannot be found, or numbers of modules that differ
            with ``match="order"``.
    """
    if match not in MATCHES:
        raise ValueError(f"match is {match!r}; expected one of {', '.join(MATCHES)}.")
    if teacher_parts is not None and (isinstance(parts, str) or match == "name"):
        raise ValueError(
            "teacher_parts names modules that are called otherwise than the student's: it goes with parts that name "
            f"modules and with match 'auto' or 'order'; found parts={parts!r}, match={match!r}."
        )
    student, teacher, layers = checked(student, teacher)
    mine = named_parts(student, parts, example, "student")
    theirs = mine if match == "name" else named_parts(teacher, teacher_parts or parts, example, "teacher")
    if set(mine) != set(theirs):
        raise ValueError(f"parts are {', '.join(mine)}, teacher_parts {', '.join(theirs)}; expected the same keys.")
    kept: dict[str, str] = {}
    modules: dict[str, list[tuple[str, str]]] = {}
    for part in mine:
        modules[part], reason = pair_modules(part, student, mine[part], teacher, theirs[part], match)
        if reason:
            whole = [unit for name in mine[part] for unit in units(student, name)]
            kept |= {tensor: reason for unit in whole for tensor in unit.tensors}
    return take_over(student, layers, modules, "equal", kept)


def pair_modules(
    part: str, student: nn.Module, names: Sequence[str], teacher: nn.Module, others: Sequence[str], match: str = "auto"
) -> tuple[list[tuple[str, str]], str]:
    """The student's modules with weights of one part, each with the teacher's, or none and the reason."""
    mine, theirs = _weighted(student, names), _weighted(teacher, others)
    if match == "name" or (match == "auto" and mine == theirs):
        return [(name, name) for name in mine], ""
    if len(mine) == len(theirs):
        return list(zip(mine, theirs, strict=True)), ""
    reason = f"the student's {part} has {len(mine)} modules with weights, the teacher's {len(theirs)}"
    if match == "order":
        raise ValueError(f"match='order' pairs modules one by one, but {reason}.")
    return [], reason


def _weighted(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of the named modules that hold weights; a name that the model does not have is left to the comparison."""
    found = dict(model.named_modules())
    return [name for name in names if name not in found or has_tensors(found[name])]
