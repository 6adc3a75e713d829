"""FGD in a loop of one's own over a torchvision detector: three lines.

::

    from fgd_hooks.integrations.torchvision import TorchvisionDistiller

    distiller = TorchvisionDistiller(student, teacher=teacher)
    optimizer.add_param_group({"params": distiller.parameters()})  # before its scheduler is made
    for images, targets in loader:  # lists, as torchvision takes them
        losses = student(images, targets)
        distilled = distiller()
        (sum(losses.values()) + distilled.loss).backward()

A torchvision detector resizes, normalises and pads its images itself, in ``model.transform``. A hook there takes the
batch and the boxes that come out, so that boxes, feature maps and the teacher's input share one padded canvas.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fgd_hooks.config import FGDConfig, TeacherShare, load_config
from fgd_hooks.distilled import Distilled
from fgd_hooks.distiller import Distiller
from fgd_hooks.errors import TapError, needs_extra
from fgd_hooks.masks import PackedBoxes
from fgd_hooks.taps.canvas import Size
from fgd_hooks.taps.hooks import LiveHook
from fgd_hooks.taps.probe import PROBE_SIZE, probe_input
from fgd_hooks.taps.tap import describe
from fgd_hooks.teacher import PerTeacher
from fgd_hooks.utils.modules import has_tensors, unwrap
from fgd_hooks.utils.preserve import preserve

with needs_extra("torchvision"):
    from torchvision.models.detection.transform import GeneralizedRCNNTransform
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

logger = logging.getLogger("fgd_hooks")

SECOND_PROBE = 320  # pixels: which maps go with the canvas shows at two sizes
FIXED_SIZE_PROBE = 512  # pixels, for a teacher of fixed size (SSD), whose last convolutions fail on small canvases


class TorchvisionDistiller(Distiller):
    """A :class:`~fgd_hooks.Distiller` that takes boxes, canvas and the teacher's input from the student's own pass.

    Student and teacher are any of torchvision's detectors (RetinaNet, FCOS, SSD, SSDlite, Faster, Mask and Keypoint
    R-CNN), with any backbone. The levels are the maps that the backbone with its neck returns; only that part of the
    teacher runs. It sees the student's resized and padded batch, in the normalisation that its own transform has. The
    map ``pool`` of an R-CNN, every second cell of the map before it, is left out, as the paper's authors do.

    Args:
        student: the detector that learns; wrappers (DDP, compile) are looked through.
        teacher: the detector that teaches, or a list of them; its ``transform`` does not run.
        config: an :class:`~fgd_hooks.config.FGDConfig`, a dict, a YAML file, or None for the defaults. Taps named in
            it begin at the detector: ``"backbone['0']"``, ``"backbone.fpn.layer_blocks.*"``.

    Raises:
        TypeError: student or teacher is no torchvision detector.
        TeacherError: the teacher is the student, shares its weights or holds NaN.
        PairingError, TapError, ConfigError, ValueError: as for :class:`~fgd_hooks.Distiller`.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        teacher: nn.Module | Sequence[nn.Module],
        config: FGDConfig | Mapping[str, Any] | str | Path | None = None,
    ) -> None:
        student = _detector(student, "student")
        given = [teacher] if isinstance(teacher, nn.Module) else teacher
        detectors = [_detector(each, "teacher") for each in given]
        face, faces = OnBatch(student), [OnBatch(each) for each in detectors]
        canvases = probe_canvases(student, detectors)
        config = with_taps(load_config(config), face, faces, canvases)
        super().__init__(face, teacher=faces, config=config, example=probe_input(face, canvases[0]))
        self._student = weakref.ref(student)
        self._detectors = detectors
        self._seen = _SeenBatch()
        self._handle = student.get_submodule("transform").register_forward_hook(self._seen)

    @property
    def teachers(self) -> list[nn.Module]:
        """The teachers, frozen."""
        return self._detectors

    def forward(
        self,
        images: Any = None,
        boxes: Sequence[Tensor] | PackedBoxes | None = None,
        *,
        canvas: Size | None = None,
        task_loss: Tensor | None = None,
        teacher_inputs: Any = None,
    ) -> Distilled:
        """Distil the batch that the student has just seen. Without gradients (validation) it does nothing.

        Args:
            images: None: the batch that the student has just seen. Otherwise all as for
                :meth:`fgd_hooks.Distiller.forward`: (N, 3, H, W), resized, padded and normalised for the teacher.
            boxes: only with ``images``.
            canvas: only with ``images``.
            task_loss: () the student's own loss; only to warn when the distillation dominates it for long.
            teacher_inputs: as for :meth:`fgd_hooks.Distiller.forward`; only with ``images``.

        Raises:
            TapError: the student has not run since the last call.
            ValueError: the student is in eval mode, or ran without targets.
            NonFiniteError: NaN or infinite for ``max_bad_steps`` steps in a row.
        """
        if images is None and torch.is_grad_enabled():
            images, boxes = self._last_batch()
        self._seen.latest = None
        boxes = [] if boxes is None else boxes
        return super().forward(images, boxes, canvas=canvas, task_loss=task_loss, teacher_inputs=teacher_inputs)

    if TYPE_CHECKING:  # torch calls forward, and leaves the type of the call open
        __call__ = forward

    @contextlib.contextmanager
    def batch_to_diagnose(
        self, images: Any, boxes: Sequence[Tensor] | PackedBoxes | None, loss: Callable[[], Tensor]
    ) -> Iterator[tuple[Any, Sequence[Tensor] | PackedBoxes]]:
        """The batch that ``loss`` lets the student see, unless images and boxes are given."""
        try:
            if images is None:
                with preserve(self.student, self), self.taps.aside():
                    loss()
                    images, boxes = self._last_batch()
            yield images, [] if boxes is None else boxes
        finally:
            self._seen.latest = None

    def detach(self) -> None:
        """Remove every hook and give the teacher back as it was; may be called again."""
        self._handle.remove()
        self._seen.latest = None
        super().detach()

    def _last_batch(self) -> tuple[PerTeacher, list[Tensor]]:
        """The student's last batch as each teacher takes it, (N, 3, H, W), and its boxes in pixels of it."""
        seen, self._seen.latest = self._seen.latest, None
        if seen is None:
            self.taps.clear()
            raise TapError(
                "The student's transform has seen no batch since the last call. Run losses = student(images, targets) "
                "with gradients enabled before each distiller(), with the very student that the distiller was given "
                "(a copy of it is not watched), and not after detach()."
            )
        training, images, targets = seen
        if not training or targets is None:
            self.taps.clear()
            raise ValueError(
                "The student ran without targets, so there are no boxes: call student(images, targets)."
                if training
                else "The student ran in eval mode: it gives detections and no losses. Call student.train() before."
            )
        own, *theirs = (each.get_submodule("transform") for each in (self.student, *self._detectors))
        inputs = (renormalise(images.tensors, images.image_sizes, own, each) for each in theirs)
        return PerTeacher(inputs), [target["boxes"] for target in targets]


class OnBatch(nn.Module):
    """Another face of a torchvision detector: the same module, called with a padded batch, without its transform.

    It shares everything with the detector (modules under the same names, training mode, hooks); it only returns what
    the backbone does, a dict of feature maps. So a pass needs no targets and ends before the head.

    Args:
        detector: the model; nothing of it is changed.
    """

    backbone: nn.Module

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "__dict__", vars(detector))

    def __call__(self, images: Tensor) -> Any:
        """The maps of the backbone for (N, C, H, W), on the device and in the dtype of the weights."""
        weight = next(self.parameters(), images)
        return self.backbone(images.to(weight))


class _SeenBatch(LiveHook):
    """Forward hook of the student's transform that keeps what it made of the last batch seen with gradients."""

    latest: tuple[bool, Any, Any] | None = None  # training mode, an ImageList, targets

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Any, Any]) -> None:
        if torch.is_grad_enabled():
            self.latest = (module.training, *output)


def renormalise(images: Tensor, sizes: Sequence[Size], own: Any, other: Any) -> Tensor:
    """A padded batch in the normalisation of another transform, zero in the padding as that transform makes it.

    Args:
        images: (N, C, H, W), normalised by ``own`` and padded at the right and the bottom.
        sizes: (h, w) of each image without padding.
        own: has ``image_mean`` and ``image_std``, one number per channel.
        other: the same for the result.

    Returns:
        (N, C, H, W); ``images`` itself where both normalise alike.
    """
    values = [list(map(float, each)) for each in (own.image_mean, own.image_std, other.image_mean, other.image_std)]
    if values[:2] == values[2:]:
        return images
    mean, std, other_mean, other_std = (images.new_tensor(each)[:, None, None] for each in values)
    result = (images * std + mean - other_mean) / other_std
    for image, (height, width) in zip(result, sizes, strict=True):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return result


def probe_canvases(student: nn.Module, teachers: Sequence[nn.Module]) -> list[Size]:
    """The (h, w) in pixels at which the levels are measured, the one that strides refer to first.

    Of a student of fixed size (SSD) it is the one canvas that it ever has; else two, since maps that pair must have
    the same size on every canvas.
    """
    transform: Any = student.get_submodule("transform")
    fixed = transform.fixed_size  # (w, h)
    if fixed is not None and not transform._skip_resize:
        step = transform.size_divisible
        return [(math.ceil(fixed[1] / step) * step, math.ceil(fixed[0] / step) * step)]
    sizes = [getattr(model.get_submodule("transform"), "fixed_size", None) for model in (student, *teachers)]
    side = PROBE_SIZE if all(size is None for size in sizes) else FIXED_SIZE_PROBE
    return [(side, side), (SECOND_PROBE, SECOND_PROBE)]


def with_taps(config: FGDConfig, student: OnBatch, teachers: Sequence[OnBatch], canvases: Sequence[Size]) -> FGDConfig:
    """The configuration with the taps that it leaves to be found: the maps that each backbone returns.

    A teacher's map with the size of a student's on the first of ``canvases``, and of none on all of them, is left out:
    its size does not go with the canvas (convolutions without padding).
    """
    mine = backbone_maps(student, canvases, "student")
    shares = []
    for share, teacher in zip(config.teachers or [TeacherShare() for _ in teachers], teachers, strict=False):
        taps = share.taps or config.teacher_taps
        if taps is None:
            theirs = backbone_maps(teacher, canvases, "teacher")
            first = [sizes[0] for sizes in mine.values()]
            by_chance = [tap for tap, sizes in theirs.items() if sizes[0] in first and sizes not in mine.values()]
            if by_chance:
                said = "The teacher's %s has the size of a map of the student's on some canvases only, and is left out."
                logger.warning(said, ", ".join(by_chance))
            taps = [tap for tap in theirs if tap not in by_chance]
        shares.append(dataclasses.replace(share, taps=taps))
    config = dataclasses.replace(config, student_taps=config.student_taps or list(mine))
    if len(teachers) == 1 and not config.teachers:
        return dataclasses.replace(config, teacher_taps=shares[0].taps)
    return dataclasses.replace(config, teachers=[*shares, *config.teachers[len(shares) :]])


def backbone_maps(face: OnBatch, canvases: Sequence[Size], role: str = "model") -> dict[str, list[Size]]:
    """The tap of each map that a detector's backbone returns, with its (h, w) in cells on each canvas."""
    pooled = any(isinstance(module, LastLevelMaxPool) for module in face.backbone.modules())
    found: dict[str, list[Size]] = {}
    for canvas in canvases:
        try:
            with preserve(face, probe=True):
                maps = face(probe_input(face, canvas))
        except Exception as error:
            raise TapError(
                f"The {role}'s backbone ({type(face.backbone).__name__}) failed on images of {canvas[0]} x {canvas[1]} "
                f"pixels (h x w), which the student sees: {error}"
            ) from error
        named = {"backbone": maps} if isinstance(maps, Tensor) else maps
        if not isinstance(named, Mapping) or any(getattr(each, "ndim", 0) != 4 for each in named.values()):
            raise TapError(
                f"The {role}'s backbone ({type(face.backbone).__name__}) returns {describe(maps)}; expected a feature "
                "map (N, C, H, W) or a dict of them. Use fgd_hooks.Distiller with named taps for such a model."
            )
        for key, each in named.items():
            if not (pooled and key == "pool"):  # every second cell of the map before it: nothing of its own to learn
                tap = key if named is not maps else f"backbone['{key}']"
                found.setdefault(tap, []).append((int(each.shape[2]), int(each.shape[3])))
    return found


def detector_parts(detector: nn.Module) -> dict[str, list[str]]:
    """The modules of a torchvision detector's neck and head, for :func:`fgd_hooks.initialize`.

    ::

        initialize(student, teacher=teacher, parts=detector_parts(student), images=images)

    The neck is what the backbone holds behind its first module with weights (the FPN), the head all that is not in it.

    Raises:
        TypeError: it is no torchvision detector.
    """
    detector = _detector(detector, "model")
    inside = [
        f"backbone.{name}" for name, each in detector.get_submodule("backbone").named_children() if has_tensors(each)
    ]
    head = [name for name, each in detector.named_children() if name != "backbone" and has_tensors(each)]
    return {part: names for part, names in (("neck", inside[1:]), ("head", head)) if names}


def _detector(model: nn.Module, role: str) -> nn.Module:
    if isinstance(model, nn.Module):
        model = unwrap(model)
        parts = dict(model.named_children())
        if isinstance(parts.get("transform"), GeneralizedRCNNTransform) and "backbone" in parts:
            return model
    raise TypeError(
        f"The {role} is a {type(model).__name__}; expected a torchvision detector, with a backbone and a transform "
        "(GeneralizedRCNNTransform) of its own. For other models use fgd_hooks.Distiller."
    )
