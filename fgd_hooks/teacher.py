"""The frozen teacher: in eval mode, without gradients, stopped after its last tap, outside every state_dict."""

from __future__ import annotations

import contextlib
import itertools
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fgd_hooks.config import TeacherConfig
from fgd_hooks.errors import TapError, TeacherError
from fgd_hooks.taps.calls import call_model, cast, resolved
from fgd_hooks.taps.hooks import FeatureTaps, StopForward, run_until_tapped
from fgd_hooks.taps.tap import Tap
from fgd_hooks.utils.modules import unwrap
from fgd_hooks.utils.untrained import is_untrained

logger = logging.getLogger("fgd_hooks")

OWNED = "fgd_hooks_loaded_it"
"""Attribute of a model that an integration loaded for itself: nobody else calls it, and nobody gets it back."""

CAST_BY_AUTOCAST = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)

COMPILES_FROM = "2.6"
"""torch 2.4 compiles a tapped teacher more than once and holds on to its features; tried again with 2.15."""


SMALLER, SAME = 0.9, 0.9
"""A teacher with a smaller share of the student's parameters is doubted, and one whose share the student holds."""

_SAID: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
"""Of each teacher the kinds of doubts that were said."""


class FrozenTeacher:
    """A teacher that only ever gives features. Deliberately no nn.Module: nothing of it is trained, saved or moved.

    Args:
        model: the teacher; it is frozen and put into eval mode until :meth:`release` gives it back as it was.
        taps: where its levels are.
        config: how it runs.

    Raises:
        TeacherError: a weight or buffer is NaN or infinite.
    """

    def __init__(self, model: nn.Module, taps: Sequence[Tap], config: TeacherConfig) -> None:
        self.model = unwrap(model)
        self.config = config
        check_finite(self.model)
        self._modes = [(module, module.training) for module in self.model.modules()]
        self._flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.taps = FeatureTaps(self.model, taps, role="teacher", stop=True)
        self.taps.enabled = False
        if getattr(self.model, OWNED, False) and config.dtype in ("bfloat16", "float16"):
            for module, _ in self._modes:
                if type(module) in CAST_BY_AUTOCAST:  # once, instead of in every step; bit-equal
                    module.to(getattr(torch, config.dtype))
        self._compiled: Callable[[Any], list[Tensor]] | None = None
        if config.compile and torch.__version__ < COMPILES_FROM:
            message = "teacher.compile=true needs torch %s (found %s); the teacher runs as it is."
            logger.warning(message, COMPILES_FROM, torch.__version__)
        elif config.compile:
            self._compiled = torch.compile(self._whole)

    def features(self, images: Any) -> list[Tensor]:
        """The features (N, C, H, W) of a batch, in the order of the taps, without gradient.

        They are made under ``no_grad`` and not under ``inference_mode``: the losses and the teacher's context blocks
        keep them for the backward pass, which autograd refuses for inference tensors. Nothing here holds on to them.

        Args:
            images: what the teacher is called with, in any form of :func:`fgd_hooks.taps.calls.call_model`; images of
                another floating-point type than the weights are cast to theirs.
        """
        for module, _ in self._modes:  # a list: a walk over the modules takes longer
            module.training = False  # somebody may have called train() since
        images = resolved(images)
        if self.config.dtype == "auto" and (dtype := _dtype(self._flags)) is not None:
            images = cast(images, dtype)
        return [_ordinary(feature) for feature in self._features(images)]

    def _features(self, images: Any) -> list[Tensor]:
        device_type = next((p.device.type for p in self.model.parameters()), "cpu")
        with torch.no_grad(), self._precision(device_type), self.taps.only_here():
            if self._compiled is None:
                return run_until_tapped(self.model, self.taps, images)
            try:
                return self._compiled(images)
            except TapError:
                raise
            except Exception as error:  # of the compiler, or of the model itself, which then comes again below
                features = run_until_tapped(self.model, self.taps, images)
                self._compiled = None
                reason = " ".join(str(error).split("\n\n")[0].split())
                logger.warning(
                    "teacher.compile=true: compiling failed, the teacher runs as it is (%s: %s)",
                    type(error).__name__,
                    reason,
                )
                return features

    def _whole(self, images: Any) -> list[Tensor]:
        """What is compiled; written so that the compiler can trace the early exit."""
        self.taps.clear()
        try:  # noqa: SIM105
            call_model(self.model, images)
        except StopForward:
            pass
        return self.taps.pop()

    def _precision(self, device_type: str) -> contextlib.AbstractContextManager[Any]:
        if self.config.dtype == "auto":
            return contextlib.nullcontext()
        dtype = getattr(torch, self.config.dtype)
        return torch.autocast(device_type, dtype=dtype, enabled=dtype is not torch.float32)

    def to(self, device: torch.device) -> None:
        """Move the teacher; nothing happens when it is there already."""
        parameter = next(self.model.parameters(), None)
        if parameter is not None and parameter.device != device:
            self.model.to(device)

    def release(self) -> None:
        """Remove the hooks and give the model back with the training modes and requires_grad flags it had."""
        self.taps.detach()
        self._compiled = None
        for module, mode in self._modes:
            module.training = mode
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._modes, self._flags = [], []


class PerTeacher(tuple[Any, ...]):
    """One input for each of several teachers, where they want different ones (another normalisation, say)."""


def first_input(images: Any) -> Any:
    """What the first teacher is called with."""
    return images[0] if isinstance(images, PerTeacher) else images


def run_teachers(
    teachers: Sequence[FrozenTeacher],
    scored: Sequence[Sequence[Tap | None]],
    images: Any,
    device: torch.device | None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """For each pair its teacher's feature (N, C, H, W) and, if its loss needs them, class scores (N, K, H, W).

    Args:
        teachers: with taps at their pairs' levels, and then at the scores of those that need them.
        scored: for each teacher and each of its pairs where the scores are that its loss needs, or None.
        images: what the teachers are called with, or :class:`PerTeacher`.
        device: where the teachers are moved; None: they stay where they are.

    Raises:
        ValueError: inputs of another number of teachers.
    """
    given = images if isinstance(images, PerTeacher) else [images] * len(teachers)
    if len(given) != len(teachers):
        raise ValueError(f"PerTeacher holds {len(given)} inputs for {len(teachers)} teacher(s).")
    features: list[Tensor] = []
    scores: list[Tensor | None] = []
    for teacher, places, its_images in zip(teachers, scored, given, strict=True):
        if device is not None:
            teacher.to(device)
        taken = iter(teacher.features(its_images))
        features += itertools.islice(taken, len(places))
        scores += [None if place is None else next(taken) for place in places]
    return features, scores


def _dtype(parameters: Sequence[tuple[nn.Parameter, bool]]) -> torch.dtype | None:
    """The type that all floating-point parameters (and flags) have; None where they differ."""
    found = {parameter.dtype for parameter, _ in parameters if parameter.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def _ordinary(feature: Tensor) -> Tensor:
    """A feature that can be kept for a backward pass; one made in inference mode cannot."""
    return feature.clone() if feature.is_inference() else feature


def _all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity; True for a packed (quantised) one that cannot tell."""
    try:
        with torch.no_grad():
            return bool(torch.isfinite(tensor).all())
    except NotImplementedError:
        return True


def as_modules(teacher: Any) -> list[nn.Module]:
    """One teacher or several as their own modules, without wrappers.

    Raises:
        TeacherError: one is no module.
    """
    given = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
    for each in given:
        if not isinstance(each, nn.Module):
            raise TeacherError(
                f"The teacher is a {type(each).__name__} ({each!s:.80}); expected an nn.Module. Load its weights "
                "first: fgd_hooks.integrations.load_model.load_model takes files, and names of known models."
            )
    return [unwrap(each) for each in given]


def check_finite(teacher: nn.Module) -> None:
    """Refuse a teacher whose weights or buffers hold NaN or infinity.

    Raises:
        TeacherError: names the first such tensor.
    """
    for name, tensor in [*teacher.named_parameters(), *teacher.named_buffers()]:
        if is_lazy(tensor) or not tensor.is_floating_point():
            continue
        if not _all_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise TeacherError(
                f"The teacher's {name} holds {bad} NaN or infinite value(s) of {tensor.numel()}. Its training has "
                "diverged or its file is damaged; use another checkpoint."
            )


def check_apart(student: nn.Module, *teachers: nn.Module) -> None:
    """Refuse a teacher that is the student or shares weights with it: freezing it would freeze the student.

    Also say what speaks against a teacher (:func:`doubts`), each thing once.

    Raises:
        TeacherError: names what is shared; or no teacher is given, or one twice.
    """
    if not teachers:
        raise TeacherError("The list of teachers is empty; give at least one.")
    if len({id(vars(teacher)) for teacher in teachers}) < len(teachers):
        raise TeacherError("The same teacher is given twice; several losses go into losses=[...].")
    if any(vars(teacher) is vars(student) for teacher in teachers):  # also another face of it
        raise TeacherError(
            "Student and teacher are the same object. Load the teacher on its own, or pass copy.deepcopy(student)."
        )
    mine = set(map(id, student.parameters()))
    shared = [name for teacher in teachers for name, each in teacher.named_parameters() if id(each) in mine]
    if shared:
        raise TeacherError(
            f"Student and teacher share {len(shared)} parameter(s), for example {shared[0]!r}. Freezing the teacher "
            "would freeze the student; give the teacher weights of its own (copy.deepcopy)."
        )
    for teacher in teachers:
        said = _SAID.setdefault(teacher, set())
        for kind, text in doubts(student, teacher).items():
            if kind not in said:
                said.add(kind)
                logger.warning("%s %s", *text)


def doubts(student: nn.Module, teacher: nn.Module) -> dict[str, tuple[str, str]]:
    """What speaks against a teacher, and how to mend it, by kind: the one rule of trainings, Distiller and doctor."""
    tensors = [each for model in (student, teacher) for each in (*model.parameters(), *model.buffers())]
    if any(map(is_lazy, tensors)):
        return {}  # they have no size yet
    found, own = {}, dict(student.named_parameters())
    mine, theirs = (sum(p.numel() for p in model.parameters()) for model in (student, teacher))
    if theirs < SMALLER * mine:
        said = f"The teacher is smaller than the student ({theirs:,} and {mine:,} parameters); were the two swapped?"
        found["smaller"] = said, "Distil from the larger model into the smaller one."
    if is_untrained(teacher):
        said = "The teacher was never trained: it has the weights that it was built with. It teaches nothing."
        found["untrained"] = said, "Load its weights."
    if theirs and _shared_numbers(own, teacher) > SAME * theirs:
        said = "Teacher and student hold the same weights: there is nothing to learn."
        found["same"] = said, "Use a better teacher (bigger, or trained longer)."
    return found


def _shared_numbers(own: dict[str, nn.Parameter], teacher: nn.Module) -> int:
    """How many of the teacher's numbers the student's parameters of the same names hold as well."""
    count = 0
    for name, theirs in teacher.named_parameters():
        mine = own.get(name)
        if mine is not None and mine.shape == theirs.shape and torch.equal(mine, theirs.to(mine)):
            count += theirs.numel()
    return count
