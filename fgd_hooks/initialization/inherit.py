"""The inheriting strategy: start the student from the teacher's neck and head, wherever their weights have one shape.

::

    print(inherit(student, teacher))  # before the training, and before a moving average of the weights is made

A student whose neck is as wide as its teacher's (a ResNet-50 and a ResNet-101 detector, say) can take over all of it,
which the paper calls the inheriting strategy. Between models of different width little fits, and the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fgd_hooks.initialization.layers import units
from fgd_hooks.initialization.neck_head import PARTS, find_parts
from fgd_hooks.initialization.report import Inheritance
from fgd_hooks.teacher import check_apart, check_finite
from fgd_hooks.utils.modules import all_tensors, own_tensors, unwrap, write_tensors
from fgd_hooks.utils.registry import suggestion

MATCHES = ("auto", "name", "order")


Parts = Mapping[str, Sequence[str]]


def inherit(
    student: nn.Module,
    teacher: nn.Module,
    parts: str | Parts = "neck+head",
    match: str = "auto",
    *,
    teacher_parts: Parts | None = None,
    example: Any = None,
) -> Inheritance:
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
    student, teacher = unwrap(student), unwrap(teacher)
    if match not in MATCHES:
        raise ValueError(f"match is {match!r}; expected one of {', '.join(MATCHES)}.")
    if teacher_parts is not None and (isinstance(parts, str) or match == "name"):
        raise ValueError(
            "teacher_parts names modules that are called otherwise than the student's: it goes with parts that name "
            f"modules and with match 'auto' or 'order'; found parts={parts!r}, match={match!r}."
        )
    check_apart(student, teacher)
    check_finite(teacher)
    mine = _named(student, parts, example, "student")
    theirs = mine if match == "name" else _named(teacher, teacher_parts or parts, example, "teacher")
    if set(mine) != set(theirs):
        raise ValueError(f"parts are {', '.join(mine)}, teacher_parts {', '.join(theirs)}; expected the same keys.")

    layers = dict(teacher.named_modules(remove_duplicate=False))
    plan: dict[str, str] = {}
    kept: dict[str, str] = {}
    modules: dict[str, list[tuple[str, str]]] = {}
    for part in mine:
        modules[part], reason = _pair(part, _weighted(student, mine[part]), _weighted(teacher, theirs[part]), match)
        if reason:
            whole = [unit for name in mine[part] for unit in units(student, name)]
            kept.update({tensor: reason for unit in whole for tensor in unit.tensors})
        for name, counterpart in modules[part]:
            for unit in units(student, name):
                names, reason = unit.fit(layers, name, counterpart)
                plan.update(names)
                kept.update(dict.fromkeys(unit.tensors, reason) if reason else {})
    given = all_tensors(teacher)
    write_tensors(student, {name: given[other] for name, other in plan.items()})
    counts = {name: parameter.numel() for name, parameter in student.named_parameters()}
    copied = sum(counts.get(name, 0) for name in plan)
    return Inheritance(plan, kept, modules, copied, copied + sum(counts.get(name, 0) for name in kept))


def _pair(part: str, mine: list[str], theirs: list[str], match: str) -> tuple[list[tuple[str, str]], str]:
    """The student's modules with the teacher's, or none and the reason."""
    if match == "name" or (match == "auto" and mine == theirs):
        return [(name, name) for name in mine], ""
    if len(mine) == len(theirs):
        return list(zip(mine, theirs, strict=True)), ""
    reason = f"the student's {part} has {len(mine)} modules with weights, the teacher's {len(theirs)}"
    if match == "order":
        raise ValueError(f"match='order' pairs modules one by one, but {reason}.")
    return [], reason


def _named(model: nn.Module, parts: str | Parts, example: Any, role: str) -> dict[str, list[str]]:
    """The modules of each part that is asked for."""
    if isinstance(parts, str):
        wanted = parts.split("+")
        if len(set(wanted)) < len(wanted) or not set(wanted) <= set(PARTS):
            raise ValueError(f"parts is {parts!r}; expected 'neck', 'head', 'neck+head' or the modules of each part.")
        found = find_parts(model, example=example, role=role)
        for part in wanted:
            if not found[part]:
                raise ValueError(
                    f"No {part} was found in the {role} ({type(model).__name__}): no module with weights runs "
                    + ("between the backbone's maps and the levels" if part == "neck" else "after the levels")
                    + ". Name the modules, for example parts={'neck': ['backbone.fpn'], 'head': ['head']}."
                )
        return {part: found[part] for part in wanted}
    if not isinstance(parts, Mapping) or not parts:
        raise ValueError(f"parts is {parts!r}; expected 'neck', 'head', 'neck+head' or the modules of each part.")
    known = [name for name, _ in model.named_modules()]
    for part, names in parts.items():
        if isinstance(names, str) or not names:
            raise ValueError(f"The modules of the part {part!r} are {names!r}; expected a list of at least one name.")
        for name in names:
            if name not in known:
                raise ValueError(f"The {role} has no module {name!r} (part {part!r}). {suggestion(name, known[1:])}")
    return {part: list(names) for part, names in parts.items()}


def _weighted(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of the named modules that hold weights; a name that the model does not have is left to the comparison."""
    found = dict(model.named_modules())
    return [name for name in names if name not in found or any(map(own_tensors, found[name].modules()))]
