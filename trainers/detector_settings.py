"""The settings of the detector trainers: typed, read from a YAML file and from ``key=value`` texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from fgd_hooks.errors import ConfigError
from fgd_hooks.utils.registry import suggestion
from fgd_hooks.utils.structured_config import known_keys

AMP = ("", "bfloat16", "float16")
OPTIMIZERS = ("SGD", "AdamW")
SCHEDULES = ("multistep", "cosine")
TRAIN = ("student", "alone", "teacher")


@dataclass
class DataSettings:
    """Where the images and their boxes are: files of COCO format.

    Args:
        root: folder that the other paths begin at.
        train: annotation json of the training images.
        val: that of the images on which epochs are compared.
        test: that of images which are measured once, at the end; null: none.
        train_images: folder of the images; null: looked for beside the json (``images/train``, ``train``, ...).
        val_images: the same.
        test_images: the same.
    """

    root: str = "."
    train: str = MISSING
    val: str = MISSING
    test: str | None = None
    train_images: str | None = None
    val_images: str | None = None
    test_images: str | None = None


@dataclass
class ImageSettings:
    """How images are made ready.

    Args:
        min_size: pixels of the shorter side; of several one is drawn for each image (the last in validation).
        max_size: upper bound of the longer side.
        flip: how often an image is mirrored left to right.
        flip_vertical: how often it is turned upside down.
    """

    min_size: list[int] = field(default_factory=lambda: [800])
    max_size: int = 1333
    flip: float = 0.5
    flip_vertical: float = 0.0


@dataclass
class OptimizerSettings:
    """How the detector learns.

    Args:
        name: SGD or AdamW.
        lr: learning rate after the warm-up.
        momentum: of SGD.
        weight_decay: of all weights.
        clip: largest norm of the gradient; 0: no limit.
        warmup: iterations in which the learning rate rises.
        schedule: "multistep": times ``gamma`` at each of ``milestones`` (epochs); "cosine": down to ``final``.
        milestones: for multistep.
        gamma: for multistep.
        final: for cosine, as a fraction of ``lr``.
    """

    name: str = "SGD"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = 0.0
    warmup: int = 500
    schedule: str = "multistep"
    milestones: list[int] = field(default_factory=lambda: [8, 11])
    gamma: float = 0.1
    final: float = 0.01

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """An optimiser of all weights that learn."""
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.name == "SGD":
            return torch.optim.SGD(weights, self.lr, self.momentum, weight_decay=self.weight_decay)
        return torch.optim.AdamW(weights, self.lr, weight_decay=self.weight_decay)

    def factor(self, step: int, steps: int, epochs: int) -> float:
        """What the learning rate is multiplied by in a step, of ``steps`` in each of ``epochs``."""
        if self.schedule == "cosine":
            factor = self.final + (1 - self.final) * (1 + math.cos(math.pi * step / (steps * epochs))) / 2
        else:
            factor = self.gamma ** sum(step >= epoch * steps for epoch in self.milestones)
        return factor * min(1.0, (step + 1) / max(1, self.warmup))


@dataclass
class ModelSettings:
    """A detector of torchvision.

    Args:
        name: for ``torchvision.models.get_model``, ``retinanet_resnet50_fpn`` for example.
        weights: name of torchvision's weights for the whole detector, "DEFAULT" for example; null: none.
        weights_backbone: the same for the backbone alone.
        options: more arguments of the model.
        checkpoint: file of weights to begin with: a state_dict, or what these trainers write.
    """

    name: str = MISSING
    weights: str | None = None
    weights_backbone: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None


@dataclass
class Settings:
    """Everything about one training.

    Args:
        data: files of COCO format.
        image: sizes and flips.
        model: the detector that is trained, the student.
        teacher: the detector that teaches it; null: none.
        train: "student": ``model``, taught by ``teacher`` if there is one; "alone": ``model`` without it; "teacher":
            ``teacher`` itself, without ``model``.
        fgd: settings of the distillation (docs/api.md, FGDConfig).
        optimizer: how the detector learns.
        epochs: passes over the training images.
        batch: images per step and process.
        amp: "bfloat16" or "float16" (with a loss scaler); empty: float32.
        workers: processes that load images.
        seed: of weights, order and flips.
        eval_every: epochs from one validation to the next; the last epoch is always validated.
        log_every: steps from one TensorBoard record to the next.
        out: folder of the run.
        resume: go on from ``last.pt`` in ``out``.
        threads: of the CPU; 0: as torch decides.
        device: "cpu" or "cuda"; empty: the GPU if there is one.
    """

    data: DataSettings = field(default_factory=DataSettings)
    image: ImageSettings = field(default_factory=ImageSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    teacher: ModelSettings | None = None
    train: str = "student"
    fgd: dict[str, Any] = field(default_factory=dict)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    epochs: int = 12
    batch: int = 4
    amp: str = ""
    workers: int = 2
    seed: int = 0
    eval_every: int = 1
    log_every: int = 20
    out: str = "runs/detector"
    resume: bool = False
    threads: int = 0
    device: str = ""


Schema = TypeVar("Schema", bound=Settings)


def load_settings(schema: type[Schema], file: str | Path, overrides: Sequence[str] = ()) -> Schema:
    """Read and check the settings of a run.

    Args:
        schema: :class:`Settings`, or a class derived from it.
        file: YAML; ``base: FILE`` in it names another whose settings come first, beside it.
        overrides: ``["epochs=3", "data.root=coco", ...]``; they win.

    Raises:
        FileNotFoundError: a file does not exist.
        ConfigError: an unknown key, a wrong type or an impossible value; the message names it.
    """
    merged = OmegaConf.structured(schema)
    try:
        for layer in [*_layers(Path(file)), OmegaConf.from_dotlist(list(overrides))]:
            if merged.teacher is None and layer.get("teacher") is not None:
                # an empty section, so that its keys are checked and not replaced by a plain dict
                merged.teacher = schema.__dataclass_fields__["model"].default_factory  # type: ignore[union-attr]
            merged = OmegaConf.merge(merged, layer)
        settings: Schema = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        known = suggestion(str(key), known_keys(schema)) if "not in" in str(error) else ""
        raise ConfigError(f"{file}, key {key}: {str(error).splitlines()[0]}. {known}".rstrip()) from error
    _check(settings)
    if settings.train == "teacher":
        settings.model, settings.teacher = settings.teacher, None  # type: ignore[assignment]
    elif settings.train == "alone":
        settings.teacher = None
    return settings


def _layers(file: Path) -> list[Any]:
    if not file.is_file():
        raise FileNotFoundError(f"The settings file {str(file)!r} does not exist.")
    layer: Any = OmegaConf.load(file)
    base = layer.pop("base", None)
    return [layer] if base is None else [*_layers(file.parent / base), layer]


def _check(settings: Settings) -> None:
    for key, found, known in (
        ("train", settings.train, TRAIN),
        ("amp", settings.amp, AMP),
        ("optimizer.name", settings.optimizer.name, OPTIMIZERS),
        ("optimizer.schedule", settings.optimizer.schedule, SCHEDULES),
    ):
        if found not in known:
            raise ConfigError(f"{key} is {found!r}; expected one of {', '.join(map(repr, known))}.")
    for key, number in (
        ("epochs", settings.epochs),
        ("batch", settings.batch),
        ("eval_every", settings.eval_every),
        ("log_every", settings.log_every),
        ("image.max_size", settings.image.max_size),
        ("optimizer.lr", settings.optimizer.lr),
    ):
        if not number > 0:
            raise ConfigError(f"{key} is {number}; expected a number above 0.")
    if not settings.image.min_size:
        raise ConfigError("image.min_size is empty; expected at least one size in pixels.")
    if settings.teacher is None and (settings.train == "teacher" or (settings.fgd and settings.train == "student")):
        raise ConfigError(f"train is {settings.train!r}, but there is no teacher in these settings.")
    teacher = settings.teacher if settings.train == "student" else None
    if teacher is not None and not (teacher.checkpoint or getattr(teacher, "weights", None)):
        raise ConfigError(
            "The teacher has no trained weights: give teacher.checkpoint=FILE (train=teacher makes one), or train the "
            "student without it (train=alone)."
        )
