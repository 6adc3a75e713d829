"""The form in which images and true boxes are kept, whatever they were read from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

_EXIF_ORIENTATION = 274

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TrueImage:
    """One image and its true boxes.

    Attributes:
        file: where the image lies.
        width: pixels, after the EXIF orientation.
        height: pixels, after the EXIF orientation.
        labels: (n,) class index, counted in the order of ``EvalData.names``.
        boxes: (n, 4) left, top, width, height in pixels.
        areas: (n,) square pixels: COCO's own areas (of the mask, where the set has masks), else width * height.
        crowd: (n,) bool: regions in which detections count neither for nor against (COCO only).
    """

    file: Path
    width: int
    height: int
    labels: npt.NDArray[np.int64]
    boxes: Floats
    areas: Floats
    crowd: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class EvalData:
    """The images and true boxes of one split.

    Attributes:
        source: the file it was read from.
        names: class names; their positions are the class indices of the boxes.
        ids: the number each class has in the source: class ids of YOLO format, category ids of COCO format.
        images: at least one, at least one of them with a box.
        by_name: whether the source numbers its classes freely, so that they go with a model's by their names (COCO).
    """

    source: Path
    names: tuple[str, ...]
    ids: tuple[int, ...]
    images: tuple[TrueImage, ...]
    by_name: bool


class DataError(ValueError):
    """Data that cannot be evaluated; the message names the file, what is there, what was expected and what to do."""


class NoSplitError(DataError):
    """A data yaml without the split that is asked for."""


def true_image(
    file: Path,
    width: int,
    height: int,
    labels: Sequence[int] | Floats,
    boxes: Floats,
    areas: Floats | None = None,
    crowd: npt.NDArray[np.bool_] | None = None,
) -> TrueImage:
    """Put one image together; areas default to the boxes', crowd to none."""
    if areas is None:
        areas = boxes[:, 2] * boxes[:, 3]
    if crowd is None:
        crowd = np.zeros(len(boxes), dtype=np.bool_)
    return TrueImage(file, width, height, np.asarray(labels, dtype=np.int64), boxes, areas, crowd)


def image_size(file: Path) -> tuple[int, int]:
    """Width and height in pixels as a reader that follows the EXIF orientation sees them."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            turned = image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    except (OSError, ImportError) as error:  # ImportError: Ultralytics lets Pillow look for a HEIF reader
        raise DataError(f"{file} cannot be read as an image: {error}") from error
    return (height, width) if turned else (width, height)


def shorten(values: Sequence[object], limit: int = 12) -> str:
    """The values as text, cut where there are many."""
    shown = ", ".join(str(v) for v in values[:limit])
    return f"{shown}, ... ({len(values)} in all)" if len(values) > limit else shown
