"""What this version of Ultralytics can train, and where its models and losses need care."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.torch_version import TorchVersion

from fgd_hooks.errors import TaskError, VersionError

logger = logging.getLogger("ultralytics")  # the host's own console and log file

OLDEST = "8.4.177"
TASKS = ("detect", "segment", "pose", "obb")  # their models have a neck of several levels, their labels have boxes
NO_TEXT_ENCODER = (
    "YOLO-World needs the text encoder CLIP to train, YOLOE to validate, and the package 'clip' is not installed: "
    "pip install git+https://github.com/ultralytics/CLIP.git. On its first use it downloads weights."
)


def task_of(model: Any) -> str | None:
    """The task of a ``YOLO`` object, a trainer or a module; None where it has none that is known."""
    task = getattr(model, "task", None) or getattr(getattr(model, "args", None), "task", None)
    if task is None and isinstance(model, nn.Module) and hasattr(model, "yaml") and hasattr(model, "model"):
        from ultralytics.nn.tasks import guess_model_task

        task = guess_model_task(model)
    return None if task is None else str(task)


def check_task(model: Any, boxes_from: str = "labels") -> None:
    """Refuse a ``YOLO`` object or trainer whose task has no boxes, or no masks where boxes shall come from masks."""
    task = task_of(model)
    if task is not None and task not in TASKS:
        raise TaskError(
            f"The student is a model for the task {task!r}; FGD weighs the levels of a detector's neck by the boxes of "
            f"the labels, which {task!r} does not have. It works for {', '.join(TASKS)}."
        )
    if boxes_from == "masks" and task not in (None, "segment"):
        raise TaskError(
            f"boxes_from is 'masks', but the student is a model for the task {task!r}: only a 'segment' training has "
            "masks. Set boxes_from=labels."
        )


def check_text_encoder(student: Any) -> None:
    """Warn where a student turns class names into vectors by a package that is missing.

    Not an error, since Ultralytics tries to install it when it comes to that, in YOLOE's case after an epoch.
    """
    encodes = type(student).__name__ in ("WorldModel", "YOLOEModel", "YOLOESegModel")
    if encodes and importlib.util.find_spec("clip") is None:
        logger.warning("FGD: %s", NO_TEXT_ENCODER)


def images_counted(model: nn.Module, images: int) -> int:
    """By how many images the loss of a batch of so many is multiplied by the unwrapped student.

    Ultralytics' YOLO losses are a mean over images times their number N; RT-DETR's is the mean alone.
    """
    layers = getattr(model, "model", None)
    head = layers[-1] if isinstance(layers, nn.Sequential) and len(layers) else None
    return 1 if type(head).__name__ == "RTDETRDecoder" else images


def check_version() -> None:
    """Refuse a version that is too old.

    Before 8.4.177 the event ``teardown`` does not come after an error, and the hooks would stay on the model. Before
    8.4.140 callbacks do not reach the processes of a multi-GPU training, which would run without distillation and say
    nothing. Older ones still give the items of the loss as a tensor without names.
    """
    import ultralytics

    if TorchVersion(ultralytics.__version__) < OLDEST:
        raise VersionError(
            f"FGDCallback needs ultralytics {OLDEST} or newer; found {ultralytics.__version__}, which loses callbacks "
            "on several GPUs or after an error. Update it: pip install -U ultralytics"
        )


class DistillingLoss:
    """Stands in for the method ``loss(batch, preds)`` of one model and lets ``add`` extend what it returns.

    A copy of it, made by ``deepcopy`` or ``pickle`` of the model, is the model's own method again.

    Args:
        model: the student without its compile wrapper.
        add: called with a training batch and what the model's own ``loss`` returned; gives the result.
    """

    def __init__(self, model: nn.Module, add: Callable[[Any, Any], Any]) -> None:
        self.model = model
        self.add = add
        self.own: Callable[..., Any] = model.loss  # type: ignore[assignment]
        vars(model)["loss"] = self
        # Code that was compiled before, for a model of this class without taps, would be reused and pass the taps by.
        torch.compiler.reset()

    def __call__(self, batch: Any, preds: Any = None) -> Any:
        """The model's own loss vector and named items, extended while it trains."""
        output = self.own(batch, preds)
        if isinstance(batch, dict) and self.model.training and torch.is_grad_enabled():
            return self.add(batch, output)
        return output

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.model, "loss")

    def remove(self) -> None:
        """Give the model its own method back."""
        drop_loss(self.model)


def drop_loss(model: nn.Module) -> None:
    """Remove what replaces the method ``loss`` in a model, or in a copy of one."""
    vars(model).pop("loss", None)
