"""What every distillation loss takes and returns, and the registry of losses by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from fgd_hooks.losses.attention import compute_dtype, no_autocast
from fgd_hooks.masks import Canvas, PackedBoxes
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


class FeatureLoss(nn.Module):
    """Base of the losses that compare a student's and a teacher's feature map of one level.

    A subclass sets :attr:`part_names` and implements :meth:`forward`; it may have parameters of its own.
    """

    part_names: tuple[str, ...] = ()
    """The keys of :attr:`LossResult.parts`, in their order."""

    needs_scores: bool = False
    """Whether :meth:`forward` takes the teacher's class scores, logits (N, K, H, W), as the keyword ``scores``."""

    takes_preset: bool = False
    """Whether ``loss.preset`` gives the defaults of its options."""

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        boxes: Sequence[Tensor] | PackedBoxes,
        canvas: Canvas | None = None,
    ) -> LossResult:
        """Compare two features of the same shape.

        Args:
            student: (N, C, H, W), after its adapter.
            teacher: (N, C, H, W); takes no gradient.
            boxes: N tensors (n_i, 4) of pixel x1 y1 x2 y2, or the same packed once for all levels.
            canvas: the (h, w) in pixels that the feature map covers, for all images or one per image; not needed with
                packed boxes.
        """
        raise NotImplementedError


class WholeMapLoss(FeatureLoss):
    """Base of the losses of one part that compare whole maps; the boxes play no part.

    A subclass sets :attr:`part_names` to its one name and implements :meth:`measure`. Sums are in float32, or float64
    if a feature is, whatever the autocast.

    Args:
        channels: C of both features, for a clear error if they have another; None takes any.
        alpha: weight of the part.

    Raises:
        ValueError: a weight that is negative or not finite.
    """

    def __init__(self, channels: int | None, alpha: float) -> None:
        super().__init__()
        check_weights(alpha=alpha)
        self.channels, self.alpha = channels, alpha

    def measure(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The part before its weight, (), of two features (N, C, H, W); called without autocast."""
        raise NotImplementedError

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        boxes: Sequence[Tensor] | PackedBoxes,
        canvas: Canvas | None = None,
    ) -> LossResult:
        """The part for one level; arguments as in :meth:`FeatureLoss.forward`.

        Raises:
            ValueError: features that differ in shape or have another number of channels.
        """
        check_features(student, teacher, self.channels)
        dtype = compute_dtype(student, teacher)
        with no_autocast(student.device):
            raw = self.measure(student.to(dtype), teacher.detach().to(dtype))
            part = raw * self.alpha
        (name,) = self.part_names
        return LossResult({name: part}, {name: raw}, part)


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


def check_weights(**weights: float) -> None:
    """Raise a ValueError that names the first weight that is negative or not finite."""
    for name, value in weights.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be 0 or positive, and finite, found {value}.")


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


def pack_boxes(boxes: Sequence[Tensor] | PackedBoxes, canvas: Canvas | None, feature: Tensor) -> PackedBoxes:
    """The boxes packed on the device of ``feature``; passes packed ones through.

    Raises:
        ValueError: no canvas, or boxes of another number of images than the feature has.
    """
    if isinstance(boxes, PackedBoxes):
        packed = boxes.to(feature.device)
    elif canvas is None:
        raise ValueError("canvas is missing: the (h, w) in pixels that the boxes are measured against.")
    else:
        packed = PackedBoxes.from_list(boxes, canvas, feature.device)
    if packed.num_images != feature.shape[0]:
        raise ValueError(f"The features hold {feature.shape[0]} images, the boxes are those of {packed.num_images}.")
    return packed
