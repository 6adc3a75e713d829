"""The settings of the detector trainers: typed, read from a YAML file and from ``key=value`` texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import MISSING, OmegaConf
from torch import nn

from fgd_hooks.config import ABOVE_0, Section, at_least, bound, one_of
from fgd_hooks.errors import ConfigError
from fgd_hooks.utils.structured_config import load, read_yaml

SIZES = bound(lambda found: len(found) > 0 and min(found) > 0, "at least one size in pixels")


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
class ImageSettings(Section):
    """How images are made ready.

    Args:
        min_size: pixels of the shorter side; of several one is drawn for each image (the last in validation).
        max_size: upper bound of the longer side.
        flip: how often an image is mirrored left to right.
        flip_vertical: how often it is turned upside down.
    """

    prefix = "image."

    min_size: list[int] = field(default_factory=lambda: [800], metadata=SIZES)
    max_size: int = field(default=1333, metadata=at_least(1))
    flip: float = 0.5
    flip_vertical: float = 0.0


@dataclass
class OptimizerSettings(Section):
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

    prefix = "optimizer."

    name: str = field(default="SGD", metadata=one_of("SGD", "AdamW"))
    lr: float = field(default=0.01, metadata=ABOVE_0)
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = 0.0
    warmup: int = 500
    schedule: str = field(default="multistep", metadata=one_of("multistep", "cosine"))
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
class Settings(Section):
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
    train: str = field(default="student", metadata=one_of("student", "alone", "teacher"))
    fgd: dict[str, Any] = field(default_factory=dict)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    epochs: int = field(default=12, metadata=at_least(1))
    batch: int = field(default=4, metadata=at_least(1))
    amp: str = field(default="", metadata=one_of("", "bfloat16", "float16"))
    workers: int = 2
    seed: int = 0
    eval_every: int = field(default=1, metadata=at_least(1))
    log_every: int = field(default=20, metadata=at_least(1))
    out: str = "runs/detector"
    resume: bool = False
    threads: int = 0
    device: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher is None and (self.train == "teacher" or (self.fgd and self.train == "student")):
            raise ConfigError(f"train is {self.train!r}, but there is no teacher in these settings.")
        teacher = self.teacher if self.train == "student" else None
        if teacher is not None and not (teacher.checkpoint or getattr(teacher, "weights", None)):
            raise ConfigError(
                "The teacher has no trained weights: give teacher.checkpoint=FILE (train=teacher makes one), or train "
                "the student without it (train=alone)."
            )


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
    settings = load(schema, _values(Path(file)), overrides, name=str(file))
    if settings.train == "teacher":
        settings.model = settings.teacher  # type: ignore[assignment]
    if settings.train != "student":
        settings.teacher = None
    return settings


def _values(file: Path) -> dict[str, Any]:
    values = read_yaml(file)
    base = values.pop("base", None)
    if base is None:
        return values
    return OmegaConf.to_container(OmegaConf.merge(_values(file.parent / base), values))  # type: ignore[return-value]
