"""The boxes of an Ultralytics training batch, in pixels: from its labels, or from the masks of a segment batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fgd_hooks.errors import TaskError
from fgd_hooks.masks import PackedBoxes


def boxes_of(batch: Mapping[str, Tensor]) -> PackedBoxes:
    """The pixel boxes of an Ultralytics training batch.

    ``bboxes`` (n, 4) are centre x, centre y, width and height, as fractions of the network's input; ``batch_idx`` (n,)
    is the image of each box. ``multi_scale`` resizes the images only, which fractions do not feel. Rotated boxes (n, 5)
    have an angle in radians beside; theirs is the upright box around the four corners. Ultralytics divides their width
    by the input's width and their height by its height, whatever their angle.
    """
    images = batch["img"]
    height, width = int(images.shape[2]), int(images.shape[3])
    given = batch["bboxes"].to(images.device).float()
    centre, extent = given[:, :4].split(2, dim=1)
    if given.shape[1] == 5:
        extent = _upright(extent, given[:, 4], width / height)
    relative = torch.cat([centre.add(extent, alpha=-0.5), centre.add(extent, alpha=0.5)], dim=1)
    boxes = relative.clone()
    boxes[:, 0::2].mul_(width)  # by numbers: a tensor of the two would make the host wait for the device
    boxes[:, 1::2].mul_(height)
    index = batch["batch_idx"].to(images.device)
    return PackedBoxes.from_flat(boxes, index, images.shape[0], (height, width), relative)


def _upright(extent: Tensor, angle: Tensor, aspect: float) -> Tensor:
    """Width and height (n, 2), as fractions of the input, of the upright boxes around rotated ones.

    The ``extent`` (n, 2) of those is in the same fractions, ``angle`` (n,) in radians, ``aspect`` width by height.
    """
    cosine, sine = angle.cos().abs(), angle.sin().abs()
    width, height = extent.unbind(1)
    # a side of `width` input widths is width * aspect input heights long, and so on
    return torch.stack([width * cosine + height * sine / aspect, width * sine * aspect + height * cosine], dim=1)


def mask_boxes_of(batch: Mapping[str, Tensor], overlap: bool) -> PackedBoxes:
    """The pixel boxes around what is seen of each instance in the ``masks`` of an Ultralytics segment batch.

    An instance of which the masks show nothing (it is hidden by smaller ones, or smaller than a cell of the masks) has
    the box of its label.

    Args:
        batch: as for :func:`boxes_of`, with ``masks``: (N, h, w) of the instances' numbers within their image, from 1,
            where they overlap, else (n, h, w).
        overlap: which of the two, Ultralytics' ``overlap_mask``.
    """
    if not isinstance(batch.get("masks"), Tensor):
        raise TaskError(
            "boxes_from is 'masks', but the training batch holds no masks; only a 'segment' training has them. Set "
            "boxes_from=labels."
        )
    labelled = boxes_of(batch)
    image, masks = labelled.image, batch["masks"].to(labelled.boxes.device)
    expected = labelled.num_images if overlap else len(labelled)
    if len(masks) != expected:
        raise TaskError(
            f"The training batch holds {len(masks)} masks of shape {tuple(masks.shape[1:])}; expected {expected}, one "
            f"for each {'image' if overlap else 'instance'} (overlap_mask={overlap})."
        )
    if not len(labelled):
        return labelled
    if overlap:
        # the labels of a batch come image by image, so a number within the image is one in the batch less the first's
        number = torch.arange(1, len(image) + 1, device=image.device) - torch.searchsorted(image, image)
        seen = masks[image] == number[:, None, None]
    else:
        seen = masks > 0
    (left, right, visible), (top, bottom, _) = _extent(seen.any(1)), _extent(seen.any(2))
    height, width = batch["img"].shape[2:]
    across, down = width / seen.shape[2], height / seen.shape[1]  # pixels of a cell of the masks
    found = torch.stack([left * across, top * down, right * across, bottom * down], dim=1)
    boxes = torch.where(visible[:, None], found, labelled.boxes)
    return PackedBoxes.from_flat(boxes, image, labelled.num_images, (int(height), int(width)))


def _extent(covered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of (n, k) truths the first true place, the one after the last, and whether there is any."""
    numbers = covered.to(torch.uint8)
    first = numbers.argmax(1)
    return first, covered.shape[1] - numbers.flip(1).argmax(1), covered.any(1)
