"""The inheriting strategy: start the student from the teacher's neck and head, wherever their weights have one shape.

::

    print(inherit(student, teacher))  # before the training, and before a moving average of the weights is made

A student whose neck is as wide as its teacher's (a ResNet-50 and a ResNet-101 detector, say) can take over all of it,
which the paper calls the inheriting strategy. Between models of different width little fits, and the report says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fgd_hooks.parts import PARTS, find_parts, own_tensors
from fgd_hooks.registry import suggestion
from fgd_hooks.tapnames import unwrap
from fgd_hooks.teacher import check_apart, check_finite

if TYPE_CHECKING:
    from fgd_hooks.reconstruction import Reconstruction

MATCHES = ("auto", "name", "order")
Parts = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Inheritance:
    """What a student took over from its teacher.

    Args:
        copied: name of each student tensor (parameter or buffer) that was set -> name of the teacher's.
        kept: name of each other student tensor in these parts -> why it stayed as it was.
        modules: for each part the modules that were compared, (student's name, teacher's name).
        parameters: how many numbers were copied, buffers not counted.
        of: how many there are in these parts of the student.
        fitted: how well the student's layers repeat the teacher's, where they were fitted to it.
    """

    copied: dict[str, str]
    kept: dict[str, str]
    modules: dict[str, list[tuple[str, str]]]
    parameters: int
    of: int
    fitted: Reconstruction | None = None

    @property
    def summary(self) -> str:
        """One line."""
        parts = "+".join(self.modules)
        text = f"nothing of the {parts} was inherited"
        if self.copied:
            text = (
                f"{self.parameters:,} of {self.of:,} parameters of the {parts} were inherited "
                f"({len(self.copied)} tensors, {len(self.kept)} kept)"
            )
        text += "".join(f"; {name} kept: {reason}" for name, reason in list(self.kept.items())[:1])
        return f"{text}; {self.fitted.summary}" if self.fitted else text

    def __str__(self) -> str:
        lines = [f"{self.parameters:,} of {self.of:,} parameters inherited, {len(self.copied)} tensors"]
        for part, modules in self.modules.items():
            names = [one if one == other else f"{one} <- {other}" for one, other in modules]
            lines.append(f"  {part}: {', '.join(names) or 'nothing was compared'}")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"{len(self.kept)} tensors kept"] if self.kept else []
        for reason, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"  {names[0]}{more}: {reason}")
        lines += [str(self.fitted)] if self.fitted else []
        return "\n".join(lines)


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
        parts: "neck", "head" or "neck+head", found by a probe (see :func:`~fgd_hooks.parts.find_parts`); or the names
            of the modules of each part, ``{"neck": ["backbone.fpn"], "head": ["head"]}``.
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


@dataclass
class Unit:
    """A layer with weights and the normalisations that follow it: what is copied as a whole."""

    layers: dict[str, nn.Module]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of all its layers by name."""
        return {join(name, key): t for name, layer in self.layers.items() for key, t in own_tensors(layer).items()}

    @property
    def normalised(self) -> bool:
        """Whether its last layer is a normalisation."""
        return _normalises(list(self.layers.values())[-1])

    def counterparts(
        self, teacher: Mapping[str, nn.Module], prefix: str = "", counterpart: str = ""
    ) -> tuple[dict[str, str], str]:
        """The student's layers -> the teacher's of one kind, or nothing and the reason; ``teacher``: its modules."""
        others = {name: join(counterpart, name[len(prefix) :].lstrip(".")) for name in self.layers}
        missing = [(other, _normalises(self.layers[name])) for name, other in others.items() if other not in teacher]
        if missing:
            fused = len(missing) < len(others) and all(norm for _, norm in missing)
            return {}, f"the teacher has no {missing[0][0]}" + (" (is it fused?)" if fused else "")
        for name, layer in self.layers.items():
            other = others[name]
            mine, theirs = own_tensors(layer), own_tensors(teacher[other])
            if mine.keys() != theirs.keys():
                return {}, f"the teacher's {other} holds {', '.join(theirs) or 'nothing'}, not {', '.join(mine)}"
            if getattr(layer, "transposed", False) != getattr(teacher[other], "transposed", False):
                return {}, f"it is a {type(layer).__name__}, the teacher's {other} a {type(teacher[other]).__name__}"
        return others, ""

    def fit(self, teacher: Mapping[str, nn.Module], prefix: str, counterpart: str) -> tuple[dict[str, str], str]:
        """The student's tensors -> the teacher's, or nothing and the reason; ``teacher``: its modules by name."""
        names: dict[str, str] = {}
        others, reason = self.counterparts(teacher, prefix, counterpart)
        for name, other in others.items():
            mine, theirs = own_tensors(self.layers[name]), own_tensors(teacher[other])
            for key, tensor in mine.items():
                if tensor.shape != theirs[key].shape:
                    shapes = f"{tuple(tensor.shape)}, the teacher's {join(other, key)} {tuple(theirs[key].shape)}"
                    return {}, f"{join(name, key)} is {shapes}"
                names[join(name, key)] = join(other, key)
        return names, reason


def units(model: nn.Module, prefix: str) -> Iterator[Unit]:
    """The units of a module of the model, in the order of definition."""
    unit: Unit | None = None
    for name, layer in model.get_submodule(prefix).named_modules(prefix=prefix):
        if not own_tensors(layer):
            continue
        if unit and _normalises(layer) and name.rpartition(".")[0] == list(unit.layers)[-1].rpartition(".")[0]:
            unit.layers[name] = layer
            continue
        if unit:
            yield unit
        unit = Unit({name: layer})
    if unit:
        yield unit


def _normalises(layer: nn.Module) -> bool:
    return "norm" in type(layer).__name__.lower()


def join(*names: str) -> str:
    """The dotted name of these parts; empty ones are left out."""
    return ".".join(name for name in names if name)


def write_tensors(student: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set parameters and buffers by name, in place; all can be changed, or none is.

    Raises:
        ValueError: the student was made in inference mode.
    """
    mine = all_tensors(student)
    for name in values:
        if mine[name].is_inference():
            raise ValueError(f"The student's {name} was made in inference mode and cannot be changed; build it anew.")
    with torch.no_grad():
        for name, value in values.items():
            mine[name].copy_(value)


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model by name, shared ones under each of their names."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
