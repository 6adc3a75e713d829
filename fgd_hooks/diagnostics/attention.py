"""What the distillation looks at: masks and attentions of student and teacher, one sheet of tensors per level.

Nothing here changes a model: student, teacher and adapters run in eval mode, without gradients, and every random state,
training mode and hook is afterwards as it was before. :mod:`fgd_hooks.diagnostics.plots` draws the sheets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fgd_hooks.losses.attention import channel_attention, spatial_attention
from fgd_hooks.masks import Canvas, PackedBoxes, box_masks
from fgd_hooks.taps.hooks import FeatureTaps, run_until_tapped
from fgd_hooks.utils.modules import unwrap
from fgd_hooks.utils.preserve import preserve

if TYPE_CHECKING:
    from fgd_hooks.distiller import Distiller
    from fgd_hooks.pairing import DistillationPair


DEFAULT_TEMPERATURE = 0.5  # the paper's, for a loss that has none of its own


@dataclass(frozen=True, eq=False)
class LevelSheet:
    """What FGD sees of one image at one level; tensors on the CPU, H x W cells.

    Attributes:
        name: of the image, for titles and file names.
        level: "P3", ...
        stride: pixels per cell.
        temperature: T of the attentions.
        image: (3 or 1, h, w), as the models got it.
        boxes: (n, 4) true boxes, pixel x1 y1 x2 y2 of ``image``.
        foreground: (H, W), the scale mask S: 1 / area in cells of the smallest box over each cell.
        background: (H, W), 1 / number of background cells; 0 on the foreground.
        teacher_spatial: (H, W), mean 1.
        student_spatial: (H, W), mean 1; of the adapted feature, or of the student's own if ``adapted`` is False.
        teacher_channels: (C,), mean 1.
        student_channels: (C,), mean 1, of the adapted feature; None if ``adapted`` is False.
        adapted: whether the student was looked at through its adapter, as the loss does.
    """

    name: str
    level: str
    stride: int
    temperature: float
    image: Tensor
    boxes: Tensor
    foreground: Tensor
    background: Tensor
    teacher_spatial: Tensor
    student_spatial: Tensor
    teacher_channels: Tensor
    student_channels: Tensor | None
    adapted: bool

    @property
    def difference(self) -> Tensor:
        """(H, W), the student's spatial attention less the teacher's; its sum is 0."""
        return self.student_spatial - self.teacher_spatial

    @property
    def distance(self) -> float:
        """Attention distance: mean over the cells of |A_S^s - A_S^t|, from 0 (equal) to below 2 (nothing in common)."""
        return float(self.difference.abs().mean())


def attention_sheets(
    distiller: Distiller,
    student: nn.Module,
    images: Tensor,
    boxes: Sequence[Tensor] | PackedBoxes,
    *,
    canvas: Canvas | None = None,
    adapted: bool = True,
    names: Sequence[str] | None = None,
) -> list[LevelSheet]:
    """Masks and attentions of a batch, as the distillation sees them.

    Args:
        distiller: gives teacher, adapters, taps and temperature.
        student: the model that learns, or its moving average.
        images: (N, channels, h, w), what both models are called with; moved to the student's device and dtype.
        boxes: N tensors (n_i, 4) of pixel x1 y1 x2 y2, or packed.
        canvas: (h, w) in pixels that the feature maps cover; None: the size of ``images``.
        adapted: False where the adapters are not trained: what an untrained adapter makes of the student says nothing
            about it, so the sheets then hold the spatial attention of the student's own feature, and none of its
            channels. Levels whose adapter has no parameters (equal channels) are shown in full either way.
        names: of the images; None: "image 0", ...

    Returns:
        One sheet per image and level: all levels of the first image, then those of the second.

    Raises:
        ValueError: images are no batch tensor, or boxes, names or maps do not fit.
        TapError: a tap did not fire.
    """
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise ValueError(
            f"images is a {type(images).__name__} of shape {list(getattr(images, 'shape', []))}; expected one tensor "
            "(N, C, h, w)."
        )
    names = [f"image {number}" for number in range(len(images))] if names is None else names
    parameter = next(student.parameters(), torch.empty(0))
    batch = images.to(parameter.device, parameter.dtype)
    if not isinstance(boxes, PackedBoxes):
        boxes = PackedBoxes.from_list(boxes, canvas or (int(images.shape[2]), int(images.shape[3])))
    if len(names) != len(images) or boxes.num_images != len(images):
        raise ValueError(
            f"There are {len(images)} images, {len(names)} names and boxes for {boxes.num_images} images; expected as "
            "many of each."
        )
    with preserve(student, distiller.adapters, probe=True):
        taps = FeatureTaps(unwrap(student), [pair.student.tap for pair in distiller.pairs], role="student", stop=True)
        with taps:
            features = run_until_tapped(student, taps, batch)
        taught = distiller.teacher_features(images.to(parameter.device, torch.float32))
        levels = [
            _level_sheets(distiller, pair, own, target, images, boxes.to(parameter.device), adapted, names)
            for pair, own, target in zip(distiller.pairs, features, taught, strict=True)
        ]
    return [level[number] for number in range(len(images)) for level in levels]


def _level_sheets(
    distiller: Distiller,
    pair: DistillationPair,
    student: Tensor,
    teacher: Tensor,
    images: Tensor,
    boxes: PackedBoxes,
    adapted: bool,
    names: Sequence[str],
) -> list[LevelSheet]:
    size = (int(teacher.shape[2]), int(teacher.shape[3]))
    temperature = float(getattr(distiller.losses[pair.name], "temperature", DEFAULT_TEMPERATURE))
    adapted = adapted or next(distiller.adapters[pair.name].parameters(), None) is None
    if adapted:
        student = distiller.adapt(pair, student, size)
    elif student.shape[2:] != size:
        student = nn.functional.interpolate(student, size, mode="bilinear", align_corners=False)
    masks = box_masks(boxes, *size)
    spatial = [spatial_attention(feature, temperature).float().cpu() for feature in (teacher, student)]
    channels = [channel_attention(feature, temperature).float().cpu() for feature in (teacher, student)]
    foreground, background = (mask.cpu() for mask in masks)
    return [
        LevelSheet(
            name=name,
            level=pair.name,
            stride=int(pair.student.stride),
            temperature=temperature,
            image=images[number].float().cpu(),
            boxes=boxes.boxes[boxes.image == number].cpu(),
            foreground=foreground[number],
            background=background[number],
            teacher_spatial=spatial[0][number],
            student_spatial=spatial[1][number],
            teacher_channels=channels[0][number],
            student_channels=channels[1][number] if adapted else None,
            adapted=adapted,
        )
        for number, name in enumerate(names)
    ]


def attention_distances(sheets: Sequence[LevelSheet]) -> dict[str, float]:
    """Level to attention distance, the mean of :attr:`LevelSheet.distance` over the images."""
    found: dict[str, list[float]] = {}
    for sheet in sheets:
        found.setdefault(sheet.level, []).append(sheet.distance)
    return {level: sum(values) / len(values) for level, values in found.items()}
