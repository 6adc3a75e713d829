"""Where a model's neck and head are, by a probe: the modules that run before and after its feature levels exist."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from fgd_hooks.taps.chooser import Chooser
from fgd_hooks.taps.levels import find_levels, tapped
from fgd_hooks.taps.observation import Observation
from fgd_hooks.taps.probe import probes
from fgd_hooks.utils.modules import own_tensors, unwrap
from fgd_hooks.utils.preserve import preserve
from fgd_hooks.utils.registry import suggestion

PARTS = ("neck", "head")
Parts = Mapping[str, Sequence[str]]
"""The names of the modules of each part."""


def find_parts(model: nn.Module, *, example: Any = None, role: str = "model") -> dict[str, list[str]]:
    """The modules of a detector's neck and of its head, by one forward pass that leaves no trace.

    The head is what runs once the feature levels (:func:`~fgd_hooks.find_levels`) exist. The neck is what
    runs between the backbone's maps, the first list or dict of maps of different sizes that a module receives or
    returns, and the levels. A backbone that passes such lists inside (HRNet) counts as neck from there on.

    Args:
        model: any detector.
        example: what it is called with; None: zeros of 256 x 256 pixels.
        role: "student" or "teacher", for messages.

    Returns:
        ``{"neck": [...], "head": [...]}``, names of the largest modules that lie in that part as a whole, in the order
        of definition; an empty list where the model has no such part, or where it cannot be told from the rest.

    Raises:
        TapError: no feature levels were found.
    """
    model = unwrap(model)
    taps = [level.tap for level in find_levels(model, example=example, role=role)]
    weighted = {name for name, module in model.named_modules() if own_tensors(module)}
    with preserve(model, probe=True):
        _, seen = next(probes(model, example, role))
    levels = [place.number for tap in taps if (place := tapped(tap, seen)) is not None]
    starts: dict[str, int] = {}  # when each module with weights began
    for call in seen.calls:
        if call.module in weighted:
            starts.setdefault(call.module, call.start)
    calls = {name: number for number, name in enumerate(starts)}
    begin, end = (sum(start < max(numbers) for start in starts.values()) for numbers in (_first_list(seen), levels))
    neck = {name for name, number in calls.items() if begin <= number < end}
    head = {name for name, number in calls.items() if number >= end}
    found = zip(PARTS, (neck, head), strict=True)
    return {part: list(_largest(model, members, calls.keys() - members)) for part, members in found}


def named_parts(model: nn.Module, parts: str | Parts, example: Any, role: str) -> dict[str, list[str]]:
    """The modules of each part that is asked for: "neck", "head" or "neck+head", by a probe, or as they are named.

    Raises:
        TapError: no feature levels were found.
        ValueError: an unknown part or module, or a part that cannot be found.
    """
    wanted = parts.split("+") if isinstance(parts, str) else list(parts) if isinstance(parts, Mapping) else []
    if not wanted or (isinstance(parts, str) and (len(set(wanted)) < len(wanted) or not set(wanted) <= set(PARTS))):
        raise ValueError(f"parts is {parts!r}; expected 'neck', 'head', 'neck+head' or the modules of each part.")
    if isinstance(parts, str):
        found = find_parts(model, example=example, role=role)
        for part in wanted:
            if not found[part]:
                raise ValueError(
                    f"No {part} was found in the {role} ({type(model).__name__}): no module with weights runs "
                    + ("between the backbone's maps and the levels" if part == "neck" else "after the levels")
                    + ". Name the modules, for example parts={'neck': ['backbone.fpn'], 'head': ['head']}."
                )
        return {part: found[part] for part in wanted}
    known = [name for name, _ in model.named_modules()]
    for part, names in parts.items():
        if isinstance(names, str) or not names:
            raise ValueError(f"The modules of the part {part!r} are {names!r}; expected a list of at least one name.")
        for name in names:
            if name not in known:
                raise ValueError(f"The {role} has no module {name!r} (part {part!r}). {suggestion(name, known[1:])}")
    return {part: list(names) for part, names in parts.items()}


def _first_list(seen: Observation) -> set[int]:
    """The numbers of the first maps of several sizes that a module is given, or returns, together."""
    chooser = Chooser(seen)
    moments = [(call.start, tree) for call in seen.calls if call.module for _, _, tree in call.inputs]
    moments += [(call.end, call.output) for call in seen.calls if call.output is not None]
    for _, tree in sorted(moments, key=lambda each: each[0]):
        for maps in chooser.lists(tree):
            if chooser.sizes(maps) > 1:
                return {leaf.number for _, leaf in maps}
    return {0}


def _largest(model: nn.Module, members: set[str], others: set[str], name: str = "") -> Iterator[str]:
    """The names of the largest modules that hold some of ``members`` and none of ``others``."""
    module = model.get_submodule(name)
    inside = {f"{name}.{each}".strip(".") if each else name for each, _ in module.named_modules()}
    if name and inside & members and not inside & others:
        yield name
    elif inside & members:
        for child, _ in module.named_children():
            yield from _largest(model, members, others, f"{name}.{child}".strip("."))
