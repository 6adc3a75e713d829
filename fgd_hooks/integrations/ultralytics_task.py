"""What the callback knows of Ultralytics' tasks and of how its families count their loss."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from torch import Tensor, nn

logger = logging.getLogger("ultralytics")  # the host's own console and log file

TASKS = ("detect", "segment", "pose", "obb")
"""The tasks whose models have a neck of several levels, and labels with boxes."""


NO_TEXT_ENCODER = (
    "YOLO-World needs the text encoder CLIP to train, YOLOE to validate, and the package 'clip' is not installed: "
    "pip install git+https://github.com/ultralytics/CLIP.git. On its first use it downloads weights."
)


class TaskError(ValueError):
    """A student whose task has no boxes, or no pyramid, to distil with."""


def task_of(model: Any) -> str | None:
    """The task of a ``YOLO`` object, a trainer or a module; None where it has none that is known."""
    task = getattr(model, "task", None) or getattr(getattr(model, "args", None), "task", None)
    if task is None and isinstance(model, nn.Module) and hasattr(model, "yaml") and hasattr(model, "model"):
        from ultralytics.nn.tasks import guess_model_task

        task = guess_model_task(model)
    return None if task is None else str(task)


def check_task(model: Any, boxes_from: str = "labels") -> None:
    """Refuse a student that cannot be distilled.

    Args:
        model: a ``YOLO`` object or a trainer.
        boxes_from: the setting of that name.

    Raises:
        TaskError: its task has no boxes, or no masks where the boxes shall come from masks.
    """
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


def images_counted(model: nn.Module, batch: Tensor) -> int:
    """By how many images the loss of a training batch is multiplied.

    Ultralytics' YOLO losses are a mean over images times the number of images N; RT-DETR's is the mean alone.

    Args:
        model: the student, unwrapped.
        batch: its images (N, C, H, W).
    """
    layers = getattr(model, "model", None)
    head = layers[-1] if isinstance(layers, nn.Sequential) and len(layers) else None
    return 1 if type(head).__name__ == "RTDETRDecoder" else int(batch.shape[0])
