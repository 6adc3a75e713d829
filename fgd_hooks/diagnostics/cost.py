"""What a distillation costs beside the plain training: parameters, operations and memory, known before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fgd_hooks.adapters import automatic_adapter
from fgd_hooks.masks import PackedBoxes
from fgd_hooks.taps.probe import probe_input
from fgd_hooks.utils.preserve import preserve

if TYPE_CHECKING:
    from fgd_hooks.distiller import Distiller


@dataclass(frozen=True)
class Cost:
    """The extra cost of distilling one batch.

    Operations are counted by torch.utils.flop_counter on one image, times the batch: convolutions and matrix products,
    a multiplication and an addition as two; element-wise work, such as most of the loss, is not counted.

    Memory is computed, not measured: the weights of the teacher; adapters and context blocks with gradient and two
    moments of an optimizer; and per level the teacher's feature and the adapted student feature, which are kept for the
    backward pass. The passing maps inside the teacher's forward pass come on top.

    Attributes:
        summary: what is distilled into what.
        batch: images.
        size: (h, w) of the images in pixels.
        parameters: trained beside the student.
        teacher_flops: of the teacher's forward pass up to its last tap, for the batch.
        own_flops: of adapters and losses, forward and backward, for the batch.
        weight_bytes: teacher's weights, and adapters and losses with what their training keeps.
        feature_bytes: of the features kept.
    """

    summary: str
    batch: int
    size: tuple[int, int]
    parameters: int
    teacher_flops: int
    own_flops: int
    weight_bytes: int
    feature_bytes: int

    def __str__(self) -> str:
        total = (self.teacher_flops + self.own_flops) / 1e9
        memory = (self.weight_bytes + self.feature_bytes) / 1e6
        return (
            f"{self.summary}; {_count(self.parameters)} parameters of adapters and loss are trained beside it; a "
            f"step of {self.batch} images of {self.size[0]}x{self.size[1]} costs {total:.3g} GFLOPs more (teacher "
            f"{self.teacher_flops / 1e9:.3g}, adapters and loss {self.own_flops / 1e9:.3g}) and about {memory:.3g} MB "
            f"more memory (weights {self.weight_bytes / 1e6:.3g}, features {self.feature_bytes / 1e6:.3g})"
        )


def extra_cost(distiller: Distiller, batch: int, size: int) -> Cost:
    """The :class:`Cost` of distilling ``batch`` square images of ``size`` pixels; leaves no trace."""
    teachers = distiller.teachers
    image = probe_input(distiller.student, size)
    with preserve(*teachers, distiller):
        with FlopCounterMode(display=False) as teaching:
            taught, scores = distiller.teach(image, image.device)
        boxes = PackedBoxes.from_list([image.new_zeros(0, 4)], (size, size), image.device)
        with torch.enable_grad(), FlopCounterMode(display=False) as own:
            for pair, target, score in zip(distiller.pairs, taught, scores, strict=True):
                shape = (1, pair.student.channels, *target.shape[2:])
                feature = torch.zeros(shape, device=target.device, requires_grad=True)
                distiller.level_loss(pair, feature, target, boxes, score).loss.backward()
    parameters = sum(p.numel() for p in distiller.parameters())
    weights = sum(t.numel() * t.element_size() for teacher in teachers for t in teacher.state_dict().values())
    return Cost(
        summary=_summary(distiller),
        batch=batch,
        size=(size, size),
        parameters=parameters,
        teacher_flops=teaching.get_total_flops() * batch,
        own_flops=own.get_total_flops() * batch,
        weight_bytes=weights + 4 * 4 * parameters,
        # the loss works in float32
        feature_bytes=sum(target.numel() * (target.element_size() + 4) for target in taught) * batch,
    )


def _summary(distiller: Distiller) -> str:
    """``t.pt (9.4 M parameters) teaches DetectionModel (2.4 M) at P3 ...``."""
    levels = []
    for pair in distiller.pairs:
        channels, adapter = (pair.student.channels, pair.teacher.channels), distiller.config.adapter
        adapter = automatic_adapter(*channels) if adapter == "auto" else adapter
        levels.append(f"{pair.name} {channels[1]}->{channels[0]} channels ({adapter})")
    named = zip_longest(distiller.config.teacher_names, distiller.teachers)
    teachers = [f"{Path(n).name if n else type(t).__name__} ({_parameters(t)} parameters)" for n, t in named]
    student = f"{type(distiller.student).__name__} ({_parameters(distiller.student)})"
    verb = "teaches" if len(teachers) == 1 else "teach"
    return f"{' and '.join(teachers)} {verb} {student} at {', '.join(levels)}"


def _parameters(model: nn.Module) -> str:
    return _count(sum(parameter.numel() for parameter in model.parameters()))


def _count(number: int) -> str:
    return f"{number / 1e6:.3g} M" if number >= 1e5 else f"{number:,}"
