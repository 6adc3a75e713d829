"""What the setting ``inherit`` does before a training begins: where the student's weights come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from fgd_hooks.reconstruction import fit_channels
from fgd_hooks.selection import inherit_channels, is_untrained
from fgd_hooks.tapnames import unwrap
from fgd_hooks.transfer import Inheritance, Parts, inherit

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
        what: None or "" (nothing); "channels"; "auto": the same if the student has not been trained yet and nine tenths
            of its parameters or more are replaced; "fitted": as "channels", then :func:`fgd_hooks.fit_channels`;
            "neck", "head" or "neck+head".
        parts: the student's modules of each of these parts; None: found by a probe.
        teacher_parts: the teacher's.
        images: gives the images for "fitted".

    Raises:
        TeacherError, TapError, ValueError: "fitted" without images; see :func:`fgd_hooks.inherit_channels`,
            :func:`fgd_hooks.fit_channels` and :func:`fgd_hooks.inherit`.
    """
    if not what or (what == "auto" and not is_untrained(unwrap(student))):
        return None
    if what in ("auto", "channels", "fitted"):
        result = inherit_channels(student, teacher, least=LEAST if what == "auto" else 0.0)
        if what != "fitted" or not result.copied:
            return result
        if images is None:
            raise ValueError("inherit='fitted' needs images to fit to; give begin() a function that returns them.")
        return dataclasses.replace(result, fitted=fit_channels(student, teacher, images()))
    return inherit(student, teacher, parts or what, teacher_parts=teacher_parts)
