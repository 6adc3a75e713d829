"""Where the student of an Ultralytics training begins: model, optimizer and EMA exist, so it copies in place."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fgd_hooks.initialization.initialize import images_to_fit, initialize
from fgd_hooks.initialization.neck_head import find_parts
from fgd_hooks.utils.modules import unwrap
from fgd_hooks.utils.preserve import RandomState
from fgd_hooks.utils.untrained import is_untrained


def yolo_parts(model: nn.Module) -> dict[str, list[str]]:
    """Neck and head of an Ultralytics model by its architecture file, of any other detector by a probe.

    The last layer is the head, the layers between the file's backbone and the head are the neck.

    Returns:
        ``{"neck": [...], "head": [...]}``, names of modules.
    """
    architecture, layers = getattr(model, "yaml", None), getattr(model, "model", None)
    if not (isinstance(architecture, dict) and "backbone" in architecture and isinstance(layers, nn.Sequential)):
        return find_parts(model, role="teacher")
    last = len(layers) - 1
    neck = [f"model.{number}" for number in range(len(architecture["backbone"]), last)]
    return {"neck": neck, "head": [f"model.{last}"]}


def inherit_into(trainer: Any, teacher: nn.Module, what: str | None) -> tuple[str, bool]:
    """Initialise the model of a trainer and its EMA from the teacher, on each rank alike.

    The optimizer holds the same parameters, and no moments yet. Between models whose levels differ (P2, P6) nothing is
    copied: their layers of one name serve different levels.

    Returns:
        One line on what was copied (empty where nothing was to be), and whether that is what was asked for.
    """
    student, teacher = unwrap(trainer.model), unwrap(teacher)
    if not what:
        return "", True
    automatic = what == "auto"
    trained = automatic and not is_untrained(student)
    nothing = f"inherit={what}: nothing was initialised from the teacher"
    mine, theirs = (_strides(model) for model in (student, teacher))
    if mine and theirs and mine != theirs:
        line = f"{nothing}: the student's levels have the strides {mine}, the teacher's {theirs}."
        return ("" if trained else line), automatic
    parts: list[dict[str, list[str]]] | tuple[None, None] = (None, None)
    if trained or what not in ("auto", "channels", "fitted"):
        wanted = "neck+head" if trained else what
        parts = [{part: yolo_parts(model)[part] for part in wanted.split("+")} for model in (student, teacher)]
        if missing := [part for part, modules in parts[1].items() if not modules]:
            line = f"{nothing}: no {missing[0]} was found in the teacher ({type(teacher).__name__})."
            return ("" if trained else line), trained

    def images() -> Tensor:
        teacher.to(trainer.device)  # where it is to teach, too
        return some_images(trainer)

    with _lent_texts(student, teacher):
        report = initialize(student, teacher=teacher, what=what, parts=parts[0], teacher_parts=parts[1], images=images)
    if report is None:
        return "", True
    if trainer.ema:
        unwrap(trainer.ema.ema).load_state_dict(student.state_dict())
    unfitted = report.fitted is not None and not report.fitted
    return f"inherit={what}: {report.summary}.", (automatic or bool(report.copied)) and not unfitted


def some_images(trainer: Any) -> Tensor:
    """Images of the training set as the training shows them: (N, C, H, W) in [0, 1], the same in each call.

    They come from a data set of their own, so that neither the training's random state nor its mosaic buffer moves; a
    mosaic is made of these images alone. As many as ``images_to_fit`` says.
    """
    args, state = trainer.args, RandomState.now()
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.default_generator.manual_seed(args.seed)  # not those of GPUs, which nothing here draws from
    trainer.args = copy.copy(args)
    trainer.args.cache = trainer.args.rect = False
    trainer.args.multi_scale = 0.0
    try:
        data = trainer.build_dataset(trainer.data["train"], mode="train", batch=trainer.batch_size)
        batch = trainer.batch_size // max(1, trainer.world_size)
        count = images_to_fit(batch, args.imgsz**2)
        samples = [data[number * len(data) // count] for number in range(count)]
        try:  # the class's own method: whoever watches the batches of this trainer counts those of the training
            found: Tensor = type(trainer).preprocess_batch(trainer, data.collate_fn(samples))["img"]
            return found
        except Exception:  # a trainer whose batches need more than the data set gives, such as YOLO-World's texts
            return torch.stack([sample["img"] for sample in samples]).to(trainer.device).float() / 255
    finally:
        trainer.args = args
        state.restore()


@contextlib.contextmanager
def _lent_texts(student: Any, teacher: Any) -> Iterator[None]:
    """Inside, a YOLO-World student has its teacher's texts instead of the random ones of an untrained model."""
    own, lent = getattr(student, "txt_feats", None), getattr(teacher, "txt_feats", None)
    both = own is not None and lent is not None
    try:
        if both:
            student.txt_feats = lent
        yield
    finally:
        if both:
            student.txt_feats = own


def _strides(model: nn.Module) -> list[int]:
    stride = getattr(model, "stride", None)
    return [int(each) for each in stride] if isinstance(stride, Tensor) else []
