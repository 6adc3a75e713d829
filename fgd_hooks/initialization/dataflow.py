"""Which layers of a student take what others give, and which of the teacher's blocks are theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fgd_hooks.utils.modules import Weighted, has_tensors, join, own_tensors
from fgd_hooks.utils.preserve import preserve

_IMAGES = 2  # the graph of a pass is held meanwhile


def layer_graph(model: nn.Module, images: Any) -> dict[str, set[str]]:
    """The convolutions and linear layers whose outputs, after operations without weights, others take: and those.

    By the autograd graph of one pass that leaves no trace. What a layer that is no key of it gives (the last of a head,
    say) is what the model predicts: its channels mean something each.

    Args:
        model: any model.
        images: what it is called with.

    Raises:
        ValueError: the model cannot be run on them.
    """
    made: dict[Any, str] = {}
    found: dict[str, set[str]] = {}

    def take(name: str, inputs: Any) -> None:
        nodes = [each.grad_fn for each in tree_leaves(inputs) if isinstance(each, Tensor)]
        seen = set(nodes)
        while nodes:
            node = nodes.pop()
            if node in made:
                found.setdefault(made[node], set()).add(name)
            elif node is not None:
                new = {each for each, _ in node.next_functions} - seen
                seen |= new
                nodes += new

    def give(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            made[output.grad_fn] = name

    few = images[:_IMAGES] if isinstance(images, (Tensor, list, tuple)) else images
    with preserve(model, probe=True), torch.enable_grad():
        model.requires_grad_(True)
        for name, layer in model.named_modules():
            if isinstance(layer, Weighted):
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: take(name, (args, kwargs)), with_kwargs=True
                )
                layer.register_forward_hook(lambda _, args, output, name=name: give(name, output))
        run_on(model, few, "student")
    return found


def run_on(model: nn.Module, images: Any, role: str) -> None:
    """One pass; whatever it raises is a ValueError that names the model."""
    try:
        model(images)
    except Exception as error:
        raise ValueError(f"The {role} ({type(model).__name__}) cannot be run on the images: {error}") from error


def repeats_itself(name: str, graph: Mapping[str, set[str]]) -> bool:
    """Whether a layer takes what it gave itself in the same pass, perhaps through others."""
    seen: set[str] = set()
    left = list(graph.get(name, ()))
    while left:
        new = left.pop()
        if new not in seen:
            seen.add(new)
            left += graph.get(new, ())
    return name in seen


def counterparts(student: nn.Module, teacher: nn.Module, name: str = "", other: str = "") -> list[tuple[str, str]]:
    """The student's modules with the teacher's of the same place: as large ones as possible, none inside another.

    Where both have a sequence of blocks of one kind and the teacher's is longer, the first block goes with the first,
    the last with the last, and those between them with evenly spaced ones.

    Args:
        student: a module of the student.
        teacher: the teacher's in its place.
        name: how the student calls it.
        other: how the teacher calls it.
    """
    children, others = dict(student.named_children()), dict(teacher.named_children())
    if own_tensors(student) or not children:
        return [(name, other)]
    called = {key: key for key in children}
    if _deeper(student, teacher):
        names, steps = list(others), max(1, len(children) - 1)
        called = {key: names[round(i * (len(names) - 1) / steps)] for i, key in enumerate(children)}
    pairs: list[tuple[str, str]] = []
    for key, child in children.items():
        mine, theirs = join(name, key), join(other, called[key])
        found = called[key] in others
        pairs += counterparts(child, others[called[key]], mine, theirs) if found else [(mine, theirs)]
    whole = all(one[len(name) :] == two[len(other) :] for one, two in pairs)
    return [(name, other)] if whole else pairs


def _deeper(student: nn.Module, teacher: nn.Module) -> bool:
    """Whether these are sequences of blocks of one kind, of which the teacher has more."""
    mine, theirs = list(student.children()), list(teacher.children())
    if not (isinstance(student, nn.Sequential) and isinstance(teacher, nn.Sequential)):
        return False
    return (
        1 <= len(mine) < len(theirs)
        and len({type(each) for each in (*mine, *theirs)}) == 1
        and all(map(has_tensors, mine))
    )
