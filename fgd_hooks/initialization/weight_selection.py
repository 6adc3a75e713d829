"""Start a student as a thinner copy of its teacher: every layer takes evenly spaced channels of the teacher's layer.

::

    print(inherit_channels(student, teacher=teacher))  # before the training, and before a moving average is made

For a student that begins from random weights and has its teacher's architecture, only narrower (YOLO26n of YOLO26s). It
is the uniform selection of Xu et al., "Initializing Models with Larger Ones" (ICLR 2024, arXiv 2311.18823), and carries
the paper's inheriting strategy from necks and heads of equal shape to whole networks of different width. It costs
nothing in training. Layers whose weights have equal shapes become the teacher's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from fgd_hooks.initialization.dataflow import counterparts
from fgd_hooks.initialization.layers import checked, take_over
from fgd_hooks.initialization.report import InitializationReport
from fgd_hooks.utils.modules import has_tensors


def inherit_channels(
    student: nn.Module,
    *,
    teacher: nn.Module,
    least: float = 0.0,
    hidden: Collection[str] = (),
    modules: Mapping[str, Sequence[tuple[str, str]]] | None = None,
) -> InitializationReport:
    """Copy evenly spaced channels of each of the teacher's layers into the student's layer of that name, in place.

    A convolution or linear layer goes together with the normalisations that follow it, whose statistics are copied,
    too. Kernels must be equally large, and the student's layer at most as wide. A layer without a normalisation must
    have as many outputs as the teacher's, so that a head for other classes stays as it was, unless it is known that
    other layers take them; where it has fewer inputs, its weights grow by that factor, since its sums have fewer terms.
    Of a longer sequence of blocks in the teacher the first, the last and evenly spaced ones between them are taken.
    Everything is compared before the first number is copied. Training modes and requires_grad flags stay as they are.

    Args:
        student: the model that is changed; wrappers are looked through.
        teacher: the model that gives; it is not changed. Its batch normalisations must not be folded in (fused).
        least: nothing is copied where less than this share of the student's parameters would be.
        hidden: the student's layers whose outputs other layers take (:func:`~fgd_hooks.initialization.dataflow.
            layer_graph`).
        modules: for each part the student's modules that are set, each with the teacher's; None: all.

    Raises:
        TeacherError: the teacher is the student, shares its weights or holds NaN.
        ValueError: the student was made in inference mode.
    """
    student, teacher, layers = checked(student, teacher)
    pairs = {"network": counterparts(student, teacher)} if modules is None else dict(modules)
    report = take_over(student, layers, pairs, "channels", least=least, hidden=hidden)
    if pairs == {"network": [("", "")]}:
        children = [name for name, child in student.named_children() if has_tensors(child)]
        pairs["network"] = [(name, name) for name in children]
    return dataclasses.replace(report, modules=pairs)
