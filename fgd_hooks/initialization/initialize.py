"""What the setting ``inherit`` does before a training begins: where the student's weights come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from fgd_hooks.initialization.inherit import inherit
from fgd_hooks.initialization.neck_head import Parts
from fgd_hooks.initialization.reconstruction import fit_channels
from fgd_hooks.initialization.report import InitializationReport
from fgd_hooks.initialization.weight_selection import inherit_channels
from fgd_hooks.utils.distributed import WORLD, ProcessGroup, on_any_process
from fgd_hooks.utils.modules import is_untrained, unwrap

LEAST = 0.9
"""Share of the student's parameters that "auto" must be able to replace."""


def initialize(
    student: nn.Module,
    *,
    teacher: nn.Module,
    what: str | None,
    parts: Parts | None = None,
    teacher_parts: Parts | None = None,
    images: Callable[[], Any] | None = None,
    process_group: ProcessGroup = WORLD,
) -> InitializationReport | None:
    """Initialise the student from its teacher as the setting ``inherit`` says; None where that is not at all.

    Args:
        student: the model that is changed.
        teacher: the model that gives, not fused.
        what: None or "" (nothing); "channels": :func:`fgd_hooks.inherit_channels`; "fitted": the same, then
            :func:`fgd_hooks.fit_channels`; "auto": as "fitted", if the student has not been trained yet and nine tenths
            of its parameters or more are replaced, as "channels" where there are no images or the models cannot be run
            on them; "neck", "head" or "neck+head": :func:`fgd_hooks.inherit`.
        parts: the student's modules of each of these parts; None: found by a probe.
        teacher_parts: the teacher's.
        images: gives what the layers are fitted to; whatever it raises is a ValueError here.
        process_group: as in :func:`fgd_hooks.fit_channels`.

    Raises:
        TeacherError, TapError, ValueError: "fitted" without images, or where there are none to be had; see
            :func:`fgd_hooks.inherit_channels`, :func:`fgd_hooks.fit_channels` and :func:`fgd_hooks.inherit`.
    """
    automatic = what == "auto"
    if not what or (automatic and not is_untrained(unwrap(student))):
        return None
    if what not in ("auto", "channels", "fitted"):
        return inherit(student, teacher=teacher, parts=parts or what, teacher_parts=teacher_parts)
    if what == "fitted" and images is None:
        raise ValueError("inherit='fitted' needs images to fit to; give initialize() a function that returns them.")
    report = inherit_channels(student, teacher=teacher, least=LEAST if automatic else 0.0)
    if what == "channels" or images is None or not report.copied:
        return report
    try:
        given = _called(images, student, process_group)
        fit = fit_channels(student, teacher=teacher, images=given, process_group=process_group)
        return dataclasses.replace(report, fitted=fit.fitted, unfitted=fit.unfitted)
    except ValueError as error:
        if not automatic:
            raise
        return dataclasses.replace(report, fitted={}, unfitted={"all": str(error)})


def _called(images: Callable[[], Any], student: nn.Module, process_group: ProcessGroup) -> Any:
    """What the function gives; a ValueError on all processes where it fails on one, so that none waits for it."""
    failure: Exception | None = None
    found = None
    try:
        found = images()
    except Exception as error:  # of a user's data set or trainer, whatever it is: a start may not end a training
        failure = error
    if on_any_process(failure is not None, next(student.parameters()).device, process_group):
        reason = f"{type(failure).__name__}: {failure}" if failure else "on another process; see its log"
        raise ValueError(f"There were no images to fit the student's layers to ({reason}).") from failure
    return found
