"""What every distillation loss takes and returns, and the registry of losses by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from fgd_hooks.masks import Canvas, PackedBoxes
from fgd_hooks.registry import Registry

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
