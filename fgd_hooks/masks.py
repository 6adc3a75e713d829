"""Ground-truth boxes to foreground and background weights of a feature map.

The weights follow the paper's Eq. 7 and 8: a foreground cell weighs one over the area, in cells, of the smallest box
that covers it, and a background cell weighs one over the number of background cells of its image.

Boxes are packed once per step (:class:`PackedBoxes`) and serve every pyramid level from there. Nothing here loops over
boxes or images, and nothing waits for the GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Canvas = Sequence[float] | Sequence[Sequence[float]] | Tensor
"""The image area in pixels that a feature map covers: one ``(h, w)`` for all images, or one per image."""

# Largest (boxes x cells) product held at once, so that memory does not grow with the boxes: 1 MiB of float32 stays in a
# CPU's cache; a GPU wants fewer launches.
_CPU_CHUNK = 1 << 18
_GPU_CHUNK = 1 << 23
_PINNED_FOR = ("cuda",)


@dataclass(frozen=True, eq=False)
class PackedBoxes:
    """The boxes of one batch as flat tensors, shared by all pyramid levels of a step.

    Build it with :meth:`from_list` or :meth:`from_flat`.

    Attributes:
        boxes: (M, 4) float32, pixel x1 y1 x2 y2 of all images one after another.
        image: (M,) int64, the image that each box belongs to.
        canvas: (N, 2) float32, the (h, w) in pixels that boxes of each image are measured against.
        num_images: N.
        relative: (M, 4) float32, ``boxes`` divided by the width and height of their canvas.
        sizes: the (H, W) of all maps of the step, if they are known: their masks are then made at once.
    """

    boxes: Tensor
    image: Tensor
    canvas: Tensor
    num_images: int
    relative: Tensor
    sizes: Sequence[tuple[int, int]] = ()
    _painted: dict[Any, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_list(
        cls, boxes: Sequence[Tensor], canvas: Canvas, device: torch.device | str | None = None
    ) -> PackedBoxes:
        """Pack one box tensor per image.

        Args:
            boxes: N tensors (n_i, 4) of pixel x1 y1 x2 y2; n_i may be 0.
            canvas: (h, w) for all images, or N of them.
            device: where the masks are needed; default: where the boxes are.

        Raises:
            ValueError: a tensor of another shape, or NaN coordinates in boxes on the CPU (on a GPU the look would make
                the host wait; :func:`check_boxes` does it on request).
        """
        if isinstance(boxes, Tensor) or not isinstance(boxes, Sequence):
            raise ValueError(
                f"boxes must be a list with one (n, 4) tensor per image, found {_describe(boxes)}. "
                "Use PackedBoxes.from_flat for one flat tensor with an image index."
            )
        for number, of_image in enumerate(boxes):
            _check_shape(of_image, f"boxes[{number}]")
        boxes = [as_corners(of_image) for of_image in boxes]
        if device is None:
            device = boxes[0].device if boxes else torch.device("cpu")
        counts = [len(of_image) if of_image.numel() else 0 for of_image in boxes]
        owner = [i for i, count in enumerate(counts) for _ in range(count)]
        flat = [of_image.detach().float() for of_image in boxes if of_image.numel()]
        packed = torch.cat(flat) if flat else torch.zeros(0, 4, device=device)
        image = torch.tensor(owner, dtype=torch.long)
        if packed.device.type == "cpu":
            return cls.from_flat(packed, image, len(boxes), canvas).to(device)
        return cls.from_flat(packed, to_device(image, packed.device), len(boxes), canvas).to(device)

    @classmethod
    def of_batch(
        cls,
        images: Any,
        boxes: Sequence[Tensor] | PackedBoxes,
        canvas: tuple[int, int] | None,
        device: torch.device | str | None = None,
    ) -> PackedBoxes:
        """Pack the boxes of a training's batch; packed ones are passed through.

        Args:
            images: (N, C, h, w), whose size is the canvas where none is given.
            boxes: as for :meth:`from_list`.
            canvas: (h, w) in pixels that the feature maps cover.
            device: as for :meth:`from_list`.

        Raises:
            ValueError: as for :meth:`from_list`, or the canvas is not known.
        """
        if isinstance(boxes, PackedBoxes):
            return boxes
        if canvas is None and not isinstance(images, Tensor):
            raise ValueError(
                f"images is a {type(images).__name__}, so the size that the feature maps cover is not known: "
                "pass canvas=(h, w), the padded size in pixels, and boxes in pixels of it."
            )
        return cls.from_list(boxes, tuple(images.shape[-2:]) if canvas is None else canvas, device)

    @classmethod
    def from_flat(
        cls, boxes: Tensor, image_index: Tensor, num_images: int, canvas: Canvas, relative: Tensor | None = None
    ) -> PackedBoxes:
        """Pack one flat box tensor, as Ultralytics and many data loaders hold it.

        Args:
            boxes: (M, 4) pixel x1 y1 x2 y2.
            image_index: (M,) or (M, 1), the image of each box, 0 <= index < ``num_images`` (any number type).
            num_images: N.
            canvas: (h, w) for all images, or N of them.
            relative: (M, 4) ``boxes`` as fractions of their canvas, where they are at hand.

        Raises:
            ValueError: shapes that do not fit, or an image index out of range (seen on the CPU only).
        """
        _check_shape(boxes, "boxes")
        boxes = as_corners(boxes).detach().reshape(-1, 4).float()
        image = image_index.detach().reshape(-1).long()
        if len(image) != len(boxes):
            raise ValueError(f"image_index must hold one number per box: {len(boxes)} boxes, {len(image)} numbers.")
        if image.device.type == "cpu" and len(image) and not 0 <= int(image.min()) <= int(image.max()) < num_images:
            raise ValueError(
                f"image_index must lie in 0..{num_images - 1}, found {int(image.min())}..{int(image.max())}."
            )
        if boxes.device.type == "cpu" and bool(boxes.isnan().any()):
            row = int(boxes.isnan().any(1).nonzero()[0])
            of_image = int(image[row])
            raise ValueError(
                f"Image {of_image}, box {int((image[:row] == of_image).sum())} has NaN coordinates: "
                f"{boxes[row].tolist()}. Remove such boxes from the targets, or find what made them."
            )
        sizes = _canvas_tensor(canvas, num_images, boxes.device)
        image = image.to(boxes.device)
        if relative is None:  # (h, w) becomes (w, h, w, h), the order of x1 y1 x2 y2
            relative = boxes / sizes.flip(1).repeat(1, 2)[image]
        return cls(boxes, image, sizes, num_images, relative)

    def to(self, device: torch.device | str) -> PackedBoxes:
        """The same boxes on ``device``; itself if they are there already."""
        device = torch.device(device)
        if self.boxes.device == device or (self.boxes.device.type == device.type and device.index is None):
            return self
        moved = [to_device(t, device) for t in (self.boxes, self.image, self.canvas, self.relative)]
        return PackedBoxes(moved[0], moved[1], moved[2], self.num_images, moved[3], self.sizes)

    def for_maps(self, sizes: Sequence[tuple[int, int]]) -> PackedBoxes:
        """The same boxes for maps of these (H, W), whose masks are made at once when the first one is asked for."""
        return dataclasses.replace(self, sizes=sizes, _painted={})

    def __len__(self) -> int:
        """The number of boxes of all images together."""
        return len(self.boxes)


def box_masks(
    packed: PackedBoxes, height: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Foreground and background weights of one level (the paper's Eq. 7 and 8).

    A box covers the columns ``floor(x1 * W / w) .. ceil(x2 * W / w)``, both included, and rows likewise, cut off at
    the border of the map. Its area is counted in cells before the cut at the right and the bottom.

    Args:
        packed: the boxes of the batch.
        height: rows H of the feature map.
        width: columns W of the feature map.
        dtype: floating type of the result; box coordinates are rounded in float32 whatever it is.

    Returns:
        foreground: (N, H, W), 1 / area of the smallest box over each cell, 0 where there is none.
        background: (N, H, W), 1 / number of background cells of that image, 0 on the foreground.
    """
    wanted = (height, width)
    painted = packed._painted.get(dtype, {})
    if wanted not in painted:
        sizes = tuple(dict.fromkeys(packed.sizes)) if wanted in packed.sizes else (wanted,)
        painted = packed._painted[dtype] = dict(zip(sizes, _paint(packed, sizes, dtype), strict=True))
    masks: tuple[Tensor, Tensor] = painted[wanted]
    return masks


def _paint(packed: PackedBoxes, sizes: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Both masks of maps of several sizes, with as much as possible done for all of them at once."""
    device, images = packed.relative.device, packed.num_images
    counts = [height * width for height, width in sizes]
    whole = torch.zeros(images * sum(counts), dtype=dtype, device=device)  # each map in one piece: scatters faster
    foreground = [part.view(images, -1) for part in whole.split([images * count for count in counts])]
    cells = torch.arange(max(map(max, sizes)), dtype=torch.float32, device=device)
    chunk = max(1, (_CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK) // max(1, *counts))
    for start in range(0, len(packed), chunk):
        relative, image = packed.relative[start : start + chunk], packed.image[start : start + chunk, None]
        # (L, 2, M) each: columns in the first row, rows in the second
        x, y = relative[:, 0::2], relative[:, 1::2]
        scaled = torch.stack([each for height, width in sizes for each in (x * width, y * height)])
        scaled = scaled.unflatten(0, (len(sizes), 2))
        first, last = scaled[..., 0].floor().clamp_(min=0), scaled[..., 1].ceil()
        # An inverted box covers nothing: its sides only have to be numbers. So do those of a box with NaN.
        sides = (last - first).add_(1).clamp_(min=1).to(dtype)
        weight = (1 / sides[:, 1] / sides[:, 0]).nan_to_num_(nan=0)  # 1 / (h * w) would round differently
        for k, ((height, width), into) in enumerate(zip(sizes, foreground, strict=True)):
            line = cells[: max(height, width)]
            inside = (line >= first[k, :, :, None]) & (line <= last[k, :, :, None])
            cover = (inside[1, :, :height] * weight[k, :, None])[:, :, None] * inside[0, :, None, :width]
            into.scatter_reduce_(0, image.expand(-1, height * width), cover.flatten(1), "amax")
    empty = (whole == 0).to(dtype).split([len(part.view(-1)) for part in foreground])
    masks = []
    for size, fg, bg in zip(sizes, foreground, (each.view(images, -1) for each in empty), strict=True):
        bg /= bg.sum(1, keepdim=True).clamp_(min=1)
        masks.append((fg.unflatten(1, size), bg.unflatten(1, size)))
    return masks


def as_corners(boxes: Tensor) -> Tensor:
    """Boxes (n, 4) as x1 y1 x2 y2; those of ``torchvision.tv_tensors`` say their format, others have these corners."""
    form = getattr(getattr(boxes, "format", None), "name", "XYXY")
    boxes = boxes.as_subclass(Tensor)
    if form == "XYXY" or not boxes.numel():
        return boxes
    if form not in ("XYWH", "CXCYWH"):
        raise ValueError(f"The boxes have the format {form}; expected XYXY, XYWH or CXCYWH.")
    position, size = boxes.float().split(2, 1)
    first = position if form == "XYWH" else position - size / 2
    return torch.cat([first, first + size], 1)


def check_boxes(boxes: Sequence[Tensor] | PackedBoxes, canvas: Canvas | None = None) -> None:
    """Find boxes that would place the foreground silently wrong; for the first steps of a training run.

    The losses accept any box, since a wrong one in a thousand does no harm. This check is for the mistakes that concern
    them all: another box format, another unit, another image size. It makes the host wait for the GPU.

    Args:
        boxes: one (n_i, 4) tensor per image, or packed boxes.
        canvas: (h, w) for all images or one per image; not needed with packed boxes.

    Raises:
        ValueError: NaN or infinite coordinates; x2 < x1 or y2 < y1; all boxes within 0..1 on a canvas of many pixels;
            a box wholly outside the canvas by more than a quarter of its side. The message names image and box.
    """
    if not isinstance(boxes, PackedBoxes):
        if canvas is None:
            raise ValueError("canvas is missing: the (h, w) in pixels that the boxes are measured against.")
        boxes = PackedBoxes.from_list(boxes, canvas)
    if len(boxes) == 0:
        return
    flat = boxes.boxes
    sizes = boxes.canvas[boxes.image]
    finite = flat.isfinite().all(1)
    _refuse(boxes, ~finite, "has coordinates that are not finite", "Remove such boxes from the targets.")
    inverted = (flat[:, 2:] < flat[:, :2]).any(1)
    _refuse(
        boxes,
        inverted,
        "has x2 < x1 or y2 < y1",
        "Expected are the corners x1 y1 x2 y2 in pixels; this looks like x y w h or cx cy w h. "
        'Convert them, for example with torchvision.ops.box_convert(boxes, "cxcywh", "xyxy").',
    )
    normalised = (flat >= 0).all() & (flat <= 1).all() & (flat[:, 2:] > flat[:, :2]).any()
    if bool(normalised & (sizes.amin() > 8)):
        h, w = boxes.canvas[0].tolist()
        raise ValueError(
            f"All {len(flat)} boxes lie within 0..1 on a canvas of {h:g} x {w:g} pixels (the first: "
            f"{flat[0].tolist()}): they look normalised. Expected are pixels; multiply x by {w:g} and y by {h:g}."
        )
    extent = sizes.flip(1)
    outside = ((flat[:, :2] > 1.25 * extent) | (flat[:, 2:] < -0.25 * extent)).any(1)
    _refuse(
        boxes,
        outside,
        "lies wholly outside its canvas",
        "The canvas must be the (h, w) in pixels of the image as the model sees it, after resizing and padding, "
        "in this order, and the boxes must have gone through the same resizing.",
    )


def _refuse(boxes: PackedBoxes, wrong: Tensor, found: str, advice: str) -> None:
    if not bool(wrong.any()):
        return
    row = int(wrong.nonzero()[0])
    image = int(boxes.image[row])
    number = int((boxes.image[:row] == image).sum())
    h, w = boxes.canvas[image].tolist()
    raise ValueError(
        f"Image {image}, box {number} {found}: {boxes.boxes[row].tolist()} on a canvas of {h:g} x {w:g} pixels "
        f"(h x w). {int(wrong.sum())} of {len(boxes)} boxes are like that. {advice}"
    )


def _check_shape(boxes: Tensor, name: str) -> None:
    if not isinstance(boxes, Tensor):
        raise ValueError(f"{name} must be a tensor of shape (n, 4), found {_describe(boxes)}.")
    if boxes.dtype == torch.bool or boxes.dtype.is_complex:
        raise ValueError(f"{name} must hold pixel coordinates as numbers, found dtype {boxes.dtype}.")
    if boxes.numel() and (boxes.dim() != 2 or boxes.shape[1] != 4):
        raise ValueError(
            f"{name} must have shape (n, 4), pixel x1 y1 x2 y2, found {tuple(boxes.shape)}. "
            "Leave out class and image columns; an image without objects is torch.zeros(0, 4)."
        )


def _describe(found: object) -> str:
    return f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy without making the host wait: from pinned memory if the target is a GPU."""
    if len(tensor) > 1 and tensor.stride(0) == 0:  # one row for all: memory whose rows overlap cannot be pinned
        return to_device(tensor[:1], device).expand(tensor.shape)
    if torch.device(device).type in _PINNED_FOR and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _canvas_tensor(canvas: Canvas, num_images: int, device: torch.device) -> Tensor:
    """(N, 2) float32; an expanded view (stride 0) if one size serves all images."""
    if not isinstance(canvas, Tensor) and len(canvas) == 2 and not isinstance(canvas[0], (Sequence, Tensor)):
        height, width = (float(side) for side in canvas)  # type: ignore[arg-type]
        if not (0 < height < float("inf") and 0 < width < float("inf")):
            raise ValueError(f"canvas must be a positive (h, w) in pixels, found {tuple(canvas)}.")
        # Filled on the device: copying two numbers there would make the host wait.
        sizes = torch.stack([torch.full((), side, dtype=torch.float32, device=device) for side in (height, width)])
        return sizes[None].expand(num_images, 2)
    sizes = torch.as_tensor(canvas, dtype=torch.float32)
    if sizes.shape == (2,):
        sizes = sizes[None].expand(num_images, 2)
    if sizes.shape != (num_images, 2):
        raise ValueError(
            f"canvas must be one (h, w) or one per image: {num_images} images, canvas of shape {tuple(sizes.shape)}."
        )
    if sizes.device.type == "cpu" and not bool(((sizes > 0) & sizes.isfinite()).all()):
        raise ValueError(f"canvas must be positive (h, w) in pixels, found {sizes.tolist()}.")
    return to_device(sizes, device)
