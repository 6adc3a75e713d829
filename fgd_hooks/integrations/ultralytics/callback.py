"""FGD inside Ultralytics YOLO training, as a callback: two lines around ``model.train()``.

::

    from ultralytics import YOLO
    from fgd_hooks import FGDCallback

    model = YOLO("yolo26n.pt")
    FGDCallback(teacher="yolo26s.pt").attach(model)
    model.train(data="coco8.yaml", epochs=100)

The callback installs itself when Ultralytics has built model, optimizer and EMA, and removes itself at the end of the
training, also after an error. The checkpoints stay Ultralytics' own; what distillation adds (adapters, context blocks,
their optimizer, the balance) is kept in ``last.fgd.safetensors`` beside ``last.pt``, and ``resume=True`` reads it.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fgd_hooks.config import FGDConfig, load_config
from fgd_hooks.distiller import Distiller
from fgd_hooks.errors import ConfigError, TaskError
from fgd_hooks.integrations.ultralytics.baseline import BaselineSession
from fgd_hooks.integrations.ultralytics.compat import check_task, check_text_encoder, check_version
from fgd_hooks.integrations.ultralytics.initialization import inherit_into
from fgd_hooks.integrations.ultralytics.session import TrainingSession, is_first_rank
from fgd_hooks.integrations.ultralytics.settings import FGDSettings, differences, named_config
from fgd_hooks.integrations.ultralytics.teacher import (
    as_list,
    check_channels,
    file_of,
    fuse_files,
    load_teachers,
    name_of,
    with_score_taps,
)
from fgd_hooks.pairing import check_names, plan_pairs
from fgd_hooks.teacher import check_apart, check_finite

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger("ultralytics")  # the host's own console and log file

EVENTS = (
    "on_pretrain_routine_end",
    "on_train_epoch_start",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_model_save",
    "on_fit_epoch_end",
    "on_train_end",
    "teardown",
)


class FGDCallback:
    """Lets a teacher teach the YOLO model that it is attached to.

    Args:
        teacher: weights file (or the name of one that Ultralytics can download), a ``YOLO`` object, or an
            ``nn.Module``; or a list of these, for several teachers. For training on several GPUs give files. None: the
            files that ``teachers`` in the configuration names.
        config: an FGDConfig, a dict, a YAML file, or None for the defaults.
        overrides: single settings that win over ``config``, ``["balance.ratio=1"]`` or ``{"balance.ratio": 1}``.
        **settings: the same as keywords, for example ``weight=2`` or ``balance={"ratio": 1}``.

    Attributes:
        inherited: one line on what the student of the last training took over from the teacher before its first step;
            empty where it began with the weights that it had.

    Raises:
        ConfigError: unknown key, wrong type or impossible value, or no teacher is given.
    """

    def __init__(
        self,
        teacher: str | Path | nn.Module | Any = None,
        *,
        config: FGDConfig | Mapping[str, Any] | str | Path | None = None,
        overrides: Sequence[str] | Mapping[str, Any] = (),
        **settings: Unpack[FGDSettings],
    ) -> None:
        self.config = load_config(load_config(config, overrides), settings)
        check_names(self.config)
        self.teacher: Any = [share.name for share in self.config.teachers] if teacher is None else teacher
        if isinstance(self.teacher, list) and (not self.teacher or None in self.teacher):
            raise ConfigError("There is no teacher: give teacher=, or teachers=[...] with the name of each one's file.")
        count = len(as_list(self.teacher))
        if self.config.teachers and len(self.config.teachers) != count:
            raise ConfigError(f"teachers has {len(self.config.teachers)} entries, but {count} teachers are given.")
        self.inherited = ""
        self._loaded: list[nn.Module] | None = None
        self._attached: weakref.WeakSet[Any] = weakref.WeakSet()
        self._sessions: weakref.WeakKeyDictionary[Any, TrainingSession | BaselineSession] = weakref.WeakKeyDictionary()

    def attach(self, model: Any) -> FGDCallback:
        """Add this callback to a ``YOLO`` model (or a trainer); the following ``model.train()`` calls distil.

        The teacher is loaded and checked here, so that a wrong one is known before the training starts.

        Raises:
            TypeError: the model takes no callbacks.
            FileNotFoundError, TeacherError: the teacher cannot be loaded, is no detector, holds NaN, or is the student.
            TaskError: the student's task has no boxes (classify, semantic, depth), or no masks where boxes_from=masks.
            VersionError: Ultralytics is too old.
        """
        if not hasattr(model, "add_callback"):
            raise TypeError(
                f"FGDCallback attaches to an ultralytics YOLO object or trainer, not to a {type(model).__name__}. For "
                "a training loop of your own use fgd_hooks.Distiller."
            )
        check_version()
        student = getattr(model, "model", None)
        if self.config.weight > 0:
            check_task(model, self.config.boxes_from)
            check_text_encoder(student)
        if self._acts:
            self._loaded = load_teachers(self.teacher)
            for teacher in self._loaded:
                check_finite(teacher)
                if isinstance(student, nn.Module):
                    check_apart(student, teacher)
            if isinstance(student, nn.Module) and self.config.weight > 0 and self.config.names_places:
                # a wrong name is found now, not when the start is fitted and a run's folder made
                plan_pairs(student, self._loaded, with_score_taps(self.config, self._loaded))
        for other in {handler.callback for handler in _handlers(model)} - {self}:
            logger.warning("FGD: another FGDCallback was attached to this model; the new one replaces it.")
            other.detach(model)
        self.detach(model)
        for event in EVENTS:
            model.add_callback(event, _Handler(self, event))
        if self._acts and hasattr(model, "tune"):
            vars(model)["tune"] = refuse_tune
        self._attached.add(model)
        return self

    def detach(self, model: Any) -> None:
        """Take this callback out of a ``YOLO`` model or trainer again."""
        for handlers in model.callbacks.values():
            handlers[:] = [each for each in handlers if not (isinstance(each, _Handler) and each.callback is self)]
        if not _handlers(model):
            vars(model).pop("tune", None)
        self._attached.discard(model)

    def distiller(self, trainer: Any) -> Distiller | None:
        """The Distiller at work in a trainer, None before and after its training."""
        session = self._sessions.get(trainer)
        return session.distiller if session else None

    def __repr__(self) -> str:
        names = [name_of(one) for one in as_list(self.teacher)]
        changed = {key: now for key, (_, now) in differences(FGDConfig(), self.config).items() if key != "teacher.name"}
        shown = {"teacher": names if isinstance(self.teacher, (list, tuple)) else names[0], **changed}
        settings = ", ".join(f"{key}={value!r}" for key, value in shown.items())
        return f"<FGDCallback {settings}: {'attached' if self._attached else 'not attached'}>"

    def __getstate__(self) -> dict[str, Any]:
        """The specification alone: this is what travels to the processes of a multi-GPU training."""
        several = isinstance(self.teacher, (list, tuple))
        files = [file_of(one) or one for one in as_list(self.teacher)]
        return {"teacher": files if several else files[0], "config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["teacher"], config=state["config"])  # type: ignore[misc]

    @property
    def _acts(self) -> bool:
        """Whether there is anything to do: with weight 0 only the inheritance that is asked for by name."""
        return self.config.weight > 0 or self.config.inherit not in (None, "", "auto")

    def _handle(self, event: str, trainer: Any) -> None:
        """One of Ultralytics' events has come."""
        if event == "on_pretrain_routine_end":
            self._begin(trainer)
        elif event == "teardown":  # the training has ended, by itself or by an error
            if session := self._sessions.pop(trainer, None):
                session.remove()
        elif session := self._sessions.get(trainer):
            getattr(session, event)()

    def _begin(self, trainer: Any) -> None:
        """Model, optimizer, DDP wrapper and EMA exist, and a resumed checkpoint is loaded; called on all ranks."""
        if not self._acts:
            self._watch(trainer)
            return
        teachers, self._loaded = self._loaded or load_teachers(self.teacher), None
        check_channels(trainer.model, teachers)
        if not trainer.resume:
            self.inherited, expected = inherit_into(trainer, teachers[0], self.config.inherit)
            if self.inherited and is_first_rank():
                logger.log(logging.INFO if expected else logging.WARNING, "FGD: %s", self.inherited)
        if self.config.weight == 0:
            self._watch(trainer)
            return
        teachers = fuse_files(teachers, self.teacher, self.config.teacher)
        self._sessions[trainer] = session = TrainingSession(trainer, teachers, named_config(self.config, self.teacher))
        session.install()

    def _watch(self, trainer: Any) -> None:
        """Show a training without distillation as one with it is shown."""
        if is_first_rank():
            self._sessions[trainer] = session = BaselineSession(trainer, self.config)
            session.install()


def refuse_tune(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``model.tune`` while a callback is attached."""
    raise TaskError(
        "model.tune() trains in processes of its own that no callback reaches: its trials would not be distilled. Loop "
        "over model.train() with the settings to be tried, or tune the student alone after callback.detach(model)."
    )


def _handlers(model: Any) -> list[_Handler]:
    return [each for handlers in model.callbacks.values() for each in handlers if isinstance(each, _Handler)]


@dataclass(frozen=True)
class _Handler:
    """What Ultralytics calls at an event; the callback that it belongs to finds it again."""

    callback: FGDCallback
    event: str

    def __call__(self, trainer: Any) -> None:
        self.callback._handle(self.event, trainer)
