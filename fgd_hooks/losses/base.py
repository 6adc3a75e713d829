"""The base of all losses: one template of the forward pass, the checks of options, and the registry by name."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from fgd_hooks.losses.attention import compute_dtype, no_autocast
from fgd_hooks.masks import Canvas, PackedBoxes, box_masks
from fgd_hooks.utils.registry import Registry

LOSSES = Registry("loss")
"""All losses by name; a class enters with ``@register_loss("name")``."""

LossClass = TypeVar("LossClass", bound=Callable[..., nn.Module])


@dataclass(frozen=True, eq=False)
class LossResult:
    """One level's distillation loss.

    Attributes:
        parts: each part times its weight, by name; differentiable, each on its own.
        raw: the same parts before the weights, already divided by the batch size.
        loss: the sum of ``parts``.
    """

    parts: dict[str, Tensor]
    raw: dict[str, Tensor]
    loss: Tensor


@dataclass(frozen=True, eq=False)
class Targets:
    """What else a loss may look at besides the two features; attributes as in :meth:`FeatureLoss.forward`."""

    boxes: Sequence[Tensor] | PackedBoxes
    canvas: Canvas | None = None
    scores: Tensor | None = None

    def masks(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Foreground and background weights of two features (N, C, H, W): see :func:`fgd_hooks.masks.box_masks`."""
        if isinstance(self.boxes, PackedBoxes):
            packed = self.boxes.to(student.device)
        elif self.canvas is None:
            raise ValueError("canvas is missing: the (h, w) in pixels that the boxes are measured against.")
        else:
            packed = PackedBoxes.from_list(self.boxes, self.canvas, student.device)
        images, _, height, width = student.shape
        if packed.num_images != images:
            raise ValueError(f"The features hold {images} images, the boxes are those of {packed.num_images}.")
        return box_masks(packed, height, width, compute_dtype(student, teacher))


class FeatureLoss(nn.Module):
    """Base of the losses that compare a student's and a teacher's feature map of one level.

    A loss names its parts, gives each a weight, and writes its :meth:`terms`; all else is done here::

        @register_loss("cosine")
        class CosineLoss(FeatureLoss):
            part_names = ("cosine",)

            def __init__(self, channels: int, alpha: float = 1.0) -> None:
                super().__init__(channels, alpha=alpha)

            def terms(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
                return 1 - torch.cosine_similarity(student, teacher, dim=1).mean()

    It may have parameters of its own. Whatever the autocast, all is computed in float32, or float64 if a feature is.

    Args:
        channels: C of both features, for a clear error if they have another; None takes any.
        **weights: one for each of :attr:`part_names`, in their order. Each becomes an attribute of its name, which may
            be changed between steps.

    Raises:
        ValueError: a weight that is negative or not finite.
    """

    part_names: tuple[str, ...] = ()
    """The keys of :attr:`LossResult.parts`, in their order."""

    needs_scores: bool = False
    """Whether :attr:`Targets.scores` are needed; they come as the keyword ``scores``."""

    takes_preset: bool = False
    """Whether ``loss.preset`` gives the defaults of its options."""

    def __init__(self, channels: int | None = None, **weights: float) -> None:
        super().__init__()
        for name, value in weights.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be 0 or positive, and finite, found {value}.")
            setattr(self, name, value)
        self.channels = channels
        self._weight_names = tuple(weights)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each part by its name."""
        return {part: getattr(self, name) for part, name in zip(self.part_names, self._weight_names, strict=False)}

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        boxes: Sequence[Tensor] | PackedBoxes,
        canvas: Canvas | None = None,
        scores: Tensor | None = None,
    ) -> LossResult:
        """Compare two features of the same shape; parts of a batch without images are 0.

        Args:
            student: (N, C, H, W), after its adapter.
            teacher: (N, C, H, W); takes no gradient.
            boxes: N tensors (n_i, 4) of pixel x1 y1 x2 y2, or the same packed once for all levels.
            canvas: the (h, w) in pixels that the feature map covers, for all images or one per image; not needed with
                packed boxes, nor by losses that do not look at boxes.
            scores: the teacher's class scores, logits (N, K, H, W), for a loss that has :attr:`needs_scores`.

        Raises:
            ValueError: features that differ in shape or have another number of channels; boxes of another number of
                images; no scores, or scores of another shape.
        """
        check_features(student, teacher, self.channels)
        if self.needs_scores:
            check_scores(scores, student)
        if not student.numel():
            return self.weighted([student.sum(dtype=compute_dtype(student, teacher))] * len(self.part_names))
        return self.compare(student, teacher.detach(), Targets(boxes, canvas, scores))

    def compare(self, student: Tensor, teacher: Tensor, targets: Targets) -> LossResult:
        """The template itself, for features (N, C, H, W) that were checked; FGD's fused passes take its place."""
        dtype = compute_dtype(student, teacher)
        with no_autocast(student.device):
            return self.weighted(self.terms(student.to(dtype), teacher.to(dtype), targets))

    def terms(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor | Sequence[Tensor]:
        """What a loss writes: its parts before their weights, () each, in the order of :attr:`part_names`.

        Both features are (N, C, H, W) in float32 or float64, without autocast; the teacher's takes no gradient.
        """
        raise NotImplementedError

    def weighted(self, terms: Tensor | Sequence[Tensor]) -> LossResult:
        """The result for what :meth:`terms` gives."""
        terms, weights = [terms] if isinstance(terms, Tensor) else terms, self.weights
        if not len(terms) == len(weights) == len(self.part_names):
            raise ValueError(
                f"{type(self).__name__} names the parts {', '.join(self.part_names) or 'none'}; expected as many terms "
                f"and weights, found {len(terms)} and {len(weights)}."
            )
        raw = dict(zip(weights, terms, strict=True))
        parts = {name: term * weights[name] for name, term in raw.items()}
        return LossResult(parts, raw, functools.reduce(operator.add, parts.values()))


def register_loss(name: str) -> Callable[[LossClass], LossClass]:
    """Class decorator that makes a loss available to configurations under ``name``."""
    return LOSSES.register(name)


def create_loss(name: str, **options: Any) -> FeatureLoss:
    """Build the loss registered as ``name``.

    Raises:
        UnknownNameError: no such loss; the message names the nearest ones.
    """
    loss: FeatureLoss = LOSSES.create(name, **options)
    return loss


def list_losses() -> list[str]:
    """The names of all registered losses."""
    return LOSSES.names()


def check_temperature(temperature: float) -> None:
    """Raise a ValueError unless the temperature of a softmax is positive and finite."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, found {temperature}.")


def check_features(student: Tensor, teacher: Tensor, channels: int | None = None) -> None:
    """Raise a ValueError unless both are (N, C, H, W) of one shape, with ``channels`` channels if that is given."""
    for name, feature in (("student", student), ("teacher", teacher)):
        if feature.dim() != 4:
            raise ValueError(f"The {name} feature must be (N, C, H, W), found shape {tuple(feature.shape)}.")
    if student.shape != teacher.shape:
        raise ValueError(
            f"Student and teacher features differ in shape: {tuple(student.shape)} and {tuple(teacher.shape)}. "
            "An adapter has to bring the student's channels and size to the teacher's."
        )
    if channels is not None and student.shape[1] != channels:
        raise ValueError(f"The loss was built for {channels} channels, the features have {student.shape[1]}.")


def check_scores(scores: Tensor | None, feature: Tensor) -> None:
    """Raise a ValueError unless the class scores are (N, K, H, W) with N, H, W of the feature (N, C, H, W)."""
    size = (feature.shape[0], *feature.shape[2:])
    if scores is None or scores.dim() != 4 or (scores.shape[0], *scores.shape[2:]) != size:
        found = None if scores is None else tuple(scores.shape)
        raise ValueError(
            f"The teacher's class scores have the shape {found}; expected (N, classes, H, W) with N, H, W = {size}."
        )
