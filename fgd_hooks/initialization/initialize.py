"""What the setting ``inherit`` does before a training begins: where the student's weights come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from fgd_hooks.initialization.inherit import Parts, inherit
from fgd_hooks.initialization.reconstruction import fit_channels
from fgd_hooks.initialization.report import Inheritance, Reconstruction
from fgd_hooks.initialization.weight_selection import inherit_channels, is_untrained
from fgd_hooks.utils.distributed import on_any_process
from fgd_hooks.utils.modules import unwrap

LEAST = 0.9
"""Share of the student's parameters that "auto" must be able to replace."""


def begin(
    student: nn.Module,
    teacher: nn.Module,
    what: str | None,
    parts: Parts | None = None,
    teacher_parts: Parts | None = None,
    images: Callable[[], Any] | None = None,
) -> Inheritance | None:
    """Do what the setting ``inherit`` says, before a training begins; None where that is nothing.

    Args:
        student: the model that is changed.
        teacher: the model that gives, not fused.
        what: None or "" (nothing); "channels": :func:`fgd_hooks.inherit_channels`; "fitted": the same, then
            :func:`fgd_hooks.fit_channels`; "auto": as "fitted", if the student has not been trained yet and nine tenths
            of its parameters or more are replaced, as "channels" where there are no images or the models cannot be run
            on them; "neck", "head" or "neck+head".
        parts: the student's modules of each of these parts; None: found by a probe.
        teacher_parts: the teacher's.
        images: gives what the layers are fitted to; whatever it raises is a ValueError here.

    Raises:
        TeacherError, TapError, ValueError: "fitted" without images, or where there are none to be had; see
            :func:`fgd_hooks.inherit_channels`, :func:`fgd_hooks.fit_channels` and :func:`fgd_hooks.inherit`.
    """
    if not what or (what == "auto" and not is_untrained(unwrap(student))):
        return None
    if what in ("auto", "channels", "fitted"):
        automatic = what == "auto"
        if what == "fitted" and images is None:
            raise ValueError("inherit='fitted' needs images to fit to; give begin() a function that returns them.")
        result = inherit_channels(student, teacher, least=LEAST if automatic else 0.0)
        if what == "channels" or images is None or not result.copied:
            return result
        try:
            fitted = fit_channels(student, teacher, _called(images, student))
        except ValueError as error:
            if not automatic:
                raise
            fitted = Reconstruction({}, {"all": str(error)})
        return dataclasses.replace(result, fitted=fitted)
    return inherit(student, teacher, parts or what, teacher_parts=teacher_parts)


def _called(images: Callable[[], Any], student: nn.Module) -> Any:
    """What the function gives; a ValueError on all processes where it fails on one, so that none waits for it."""
    failure: Exception | None = None
    found = None
    try:
        found = images()
    except Exception as error:  # of a user's data set or trainer, whatever it is: a start may not end a training
        failure = error
    if on_any_process(failure is not None, next(student.parameters()).device):
        reason = f"{type(failure).__name__}: {failure}" if failure else "on another process; see its log"
        raise ValueError(f"There were no images to fit the student's layers to ({reason}).") from failure
    return found
