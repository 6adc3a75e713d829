"""What the setting ``inherit`` does before a training begins: where the student's weights come from."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from fgd_hooks.errors import TapError
from fgd_hooks.initialization.dataflow import layer_graph
from fgd_hooks.initialization.inherit import inherit, pair_modules
from fgd_hooks.initialization.neck_head import Parts, named_parts
from fgd_hooks.initialization.reconstruction import fit_channels
from fgd_hooks.initialization.report import InitializationReport
from fgd_hooks.initialization.weight_selection import inherit_channels
from fgd_hooks.utils.distributed import WORLD, ProcessGroup, on_any_process
from fgd_hooks.utils.modules import own_tensors, unwrap
from fgd_hooks.utils.untrained import is_untrained

LEAST = 0.9
"""Share of the student's parameters that "auto" must be able to replace."""

MOST_IMAGES, MOST_PIXELS = 64, 2**23
"""What the layers are fitted to; more pixels only if a batch of the training has more."""


def images_to_fit(batch: int, pixels: int) -> int:
    """How many images of so many pixels the layers are fitted to, in a training with so large a batch."""
    return min(MOST_IMAGES, max(batch, MOST_PIXELS // pixels))


def initialize(
    student: nn.Module,
    *,
    teacher: nn.Module,
    what: str | None = "auto",
    parts: Parts | None = None,
    teacher_parts: Parts | None = None,
    images: Any = None,
    process_group: ProcessGroup = WORLD,
) -> InitializationReport | None:
    """Initialise the student from its teacher as the setting ``inherit`` says, in place; None where it stays as it is.

    ::

        print(initialize(student, teacher=teacher, images=images))  # before the optimizer's first step

    Args:
        student: the model that is changed; wrappers are looked through.
        teacher: the model that gives, not fused. It is not changed.
        what: None or "" (nothing); "channels": :func:`fgd_hooks.inherit_channels`; "fitted": the same, then
            :func:`fgd_hooks.fit_channels`; "auto": as "fitted", of what was not trained yet. That is the whole student,
            if nine tenths of its parameters are replaced so; or, behind a trained backbone, its neck and its head, each
            on its own; "neck", "head" or "neck+head": :func:`fgd_hooks.inherit`. With "auto" the copy is not fitted
            where there are no images or the models cannot be run on them, which the report says.
        parts: the student's modules of neck and head; None: found by a probe.
        teacher_parts: the teacher's.
        images: what both models are called with, some dozens of images as in the training, or a function that gives
            them.
        process_group: as in :func:`fgd_hooks.fit_channels`.

    Raises:
        TeacherError, TapError, ValueError: "fitted" without images, or where there are none to be had; see
            :func:`fgd_hooks.inherit_channels`, :func:`fgd_hooks.fit_channels` and :func:`fgd_hooks.inherit`.
    """
    automatic = what == "auto"
    if not what:
        return None
    if what not in ("auto", "channels", "fitted"):
        return inherit(student, teacher=teacher, parts=parts or what, teacher_parts=teacher_parts)
    if what == "fitted" and images is None:
        raise ValueError("inherit='fitted' needs images to fit to; give initialize(..., images=...).")
    student, teacher = unwrap(student), unwrap(teacher)
    whole = not automatic or is_untrained(student)
    places = (
        list(parts.values()) if parts else [[name] for name, layer in student.named_modules() if own_tensors(layer)]
    )
    if not whole and not any(is_untrained(student, names) for names in places):
        return None
    batch: Any = None
    graph: dict[str, set[str]] = {}
    failure = ""
    if what != "channels" and images is not None:
        try:
            batch, graph = _run_once(images, student, process_group)
        except ValueError as error:
            if not automatic:
                raise
            failure = str(error)
    modules = None if whole else _untrained_parts(student, teacher, parts, teacher_parts, batch)
    if modules == {}:
        return None
    least = LEAST if automatic else 0.0
    report = inherit_channels(student, teacher=teacher, least=least, hidden=graph, modules=modules)
    if what == "channels" or images is None or not report.copied:
        return report
    try:
        if failure:
            raise ValueError(failure)
        every = None if modules is None else [pair for pairs in modules.values() for pair in pairs]
        fit = fit_channels(
            student, teacher=teacher, images=batch, modules=every, graph=graph, process_group=process_group
        )
        return dataclasses.replace(report, fitted=fit.fitted, unfitted=fit.unfitted)
    except ValueError as error:
        if not automatic:
            raise
        return dataclasses.replace(report, fitted={}, unfitted={"all": str(error)})


def _untrained_parts(
    student: nn.Module, teacher: nn.Module, parts: Parts | None, teacher_parts: Parts | None, example: Any
) -> dict[str, list[tuple[str, str]]]:
    """The untrained ones of neck and head of a student whose backbone was trained, with the teacher's modules."""
    try:
        mine = named_parts(student, parts or "neck+head", example, "student")
        theirs = named_parts(teacher, teacher_parts or parts or "neck+head", example, "teacher")
    except (TapError, ValueError):  # where they are cannot be told
        return {}
    pairs = {part: pair_modules(part, student, mine[part], teacher, theirs[part])[0] for part in mine}
    return {part: found for part, found in pairs.items() if found and is_untrained(student, mine[part])}


def _run_once(images: Any, student: nn.Module, process_group: ProcessGroup) -> tuple[Any, dict[str, set[str]]]:
    """The images, and which of the student's layers take what others give; a ValueError on all processes where there
    are none on one, so that none waits for it."""
    failure: Exception | None = None
    found, graph = None, {}
    try:
        found = images() if callable(images) else images
        graph = layer_graph(student, found)
    except Exception as error:  # of a user's data set or trainer, whatever it is: a start may not end a training
        failure = error
    if on_any_process(failure is not None, next(student.parameters()).device, process_group):
        reason = f"{type(failure).__name__}: {failure}" if failure else "on another process; see its log"
        raise ValueError(f"There were no images to fit the student's layers to ({reason}).") from failure
    return found, graph
