"""Images and true boxes of a split, in one form; images as a detector sees them; copies of a data set by links."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import yaml
from PIL import Image, ImageOps
from torch import Tensor

from fgd_hooks.errors import DataError

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
        left_out: why each image or box that cannot be used was left out.
    """

    source: Path
    names: tuple[str, ...]
    ids: tuple[int, ...]
    images: tuple[TrueImage, ...]
    by_name: bool
    left_out: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """The end of a line: how many images and boxes are left out, and why the first; empty where none is."""
        count = len(self.left_out)
        return f": {count} images or boxes left out, as in a training; the first: {self.left_out[0]}" if count else ""


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


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, SyntaxError, ImportError) as error:  # ImportError: Ultralytics lets Pillow look for a HEIF reader
        raise DataError(f"{file} cannot be read as an image: {error}") from error


def image_size(file: Path) -> tuple[int, int]:
    """Width and height in pixels as a reader that follows the EXIF orientation sees them."""
    with _opened(file) as image:
        image.verify()  # after which it has to be opened anew
    with _opened(file) as image:
        width, height = image.size
        turned = image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def shorten(values: Sequence[object], limit: int = 12) -> str:
    """The values as text, cut where there are many."""
    shown = ", ".join(str(v) for v in values[:limit])
    return f"{shown}, ... ({len(values)} in all)" if len(values) > limit else shown


GREY = 114  # of the padding, as in Ultralytics


def open_image(file: Path, channels: int = 3) -> Image.Image:
    """An image as Ultralytics reads it: turned by its EXIF orientation, 16 bits cut to the upper 8, RGB or grey.

    ``channels`` is 3 or 1.
    """
    if channels not in (1, 3):
        raise DataError(f"{file}: images of {channels} channels cannot be shown; expected 1 or 3")
    with _opened(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        return image.convert("L" if channels == 1 else "RGB")


def load_letterboxed(
    file: Path, imgsz: int, stride: int = 32, channels: int = 3
) -> tuple[Tensor, float, tuple[int, int]]:
    """Read an image, resize its longer side to ``imgsz``, pad both sides on either end to multiples of ``stride``.

    Returns:
        image: (channels, h, w), 0 to 1, as :func:`open_image` reads it.
        scale: pixels of the result per pixel of the file.
        offset: (x, y) of the file's top left corner in the result, in pixels.
    """
    image = open_image(file, channels)
    scale = imgsz / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new(image.mode, (-(-width // stride) * stride, -(-height // stride) * stride), (GREY,) * channels)
    offset = (canvas.width - width) // 2, (canvas.height - height) // 2
    canvas.paste(image.resize((width, height), Image.Resampling.BILINEAR), offset)
    pixels = torch.from_numpy(np.array(canvas).reshape(canvas.height, canvas.width, -1)).permute(2, 0, 1).float() / 255
    return pixels, scale, offset


def load_sample(image: TrueImage, imgsz: int, stride: int = 32, channels: int = 3) -> tuple[Tensor, Tensor]:
    """One image and its boxes on it, (c, h, w) and (n, 4) pixel x1 y1 x2 y2; see :func:`load_letterboxed`."""
    pixels, scale, offset = load_letterboxed(image.file, imgsz, stride, channels)
    boxes = torch.from_numpy(image.boxes[~image.crowd]).float().reshape(-1, 4)
    corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    return pixels, corners * scale + torch.tensor(offset * 2, dtype=torch.float32)


def linked_copy(
    truth: EvalData, to_model: dict[int, int], names: dict[int, str], folder: Path, channels: int
) -> tuple[Path, dict[str, int]]:
    """Lay out a data set of links in YOLO format; returns its yaml and the index of the image by file name."""
    position = {}
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for index, image in enumerate(truth.images):
        link = folder / "images" / f"{index:08d}{image.file.suffix.lower()}"
        link_file(image.file.resolve(), link)
        position[link.name] = index
        corners = np.concatenate([image.boxes[:, :2], image.boxes[:, :2] + image.boxes[:, 2:]], axis=1)
        corners /= np.array([image.width, image.height] * 2, dtype=np.float64)
        corners = corners.clip(0.0, 1.0)  # a row outside would make Ultralytics leave out the whole image
        rows = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1)
        lines = [
            f"{to_model[int(label)]} " + " ".join(f"{value:.9f}" for value in row)
            for label, row, crowd in zip(image.labels, rows, image.crowd, strict=True)
            if not crowd
        ]
        (folder / "labels" / f"{index:08d}.txt").write_text("\n".join(lines))
    content = {"path": folder.resolve().as_posix(), "train": "images", "val": "images", "channels": channels}
    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump({**content, "names": names}, allow_unicode=True), encoding="utf-8")
    return file, position


def link_file(source: Path, link: Path) -> None:
    """A symbolic link; where the system allows none, a hard link or a copy."""
    for make in (os.symlink, os.link, shutil.copyfile):
        try:
            make(source, link)
        except OSError:
            continue
        return
    raise OSError(f"cannot link or copy {source} to {link}")
