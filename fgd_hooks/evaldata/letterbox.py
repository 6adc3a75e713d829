"""Images of a data set as a detector gets them: resized to the input size, padded to whole strides, boxes alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fgd_hooks.evaldata.types import DataError, TrueImage

GREY = 114  # of the padding, as in Ultralytics


def load_letterboxed(file: Path, imgsz: int, stride: int = 32) -> tuple[Tensor, float, tuple[int, int]]:
    """Read an image, resize its longer side to ``imgsz``, pad both sides on either end to multiples of ``stride``.

    Returns:
        image: (3, h, w), 0 to 1, RGB, after the EXIF orientation.
        scale: pixels of the result per pixel of the file.
        offset: (x, y) of the file's top left corner in the result, in pixels.

    Raises:
        DataError: the file is no image.
    """
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ImportError) as error:  # ImportError: Ultralytics lets Pillow look for a HEIF reader
        raise DataError(f"{file} cannot be read as an image: {error}") from error
    scale = imgsz / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("RGB", (-(-width // stride) * stride, -(-height // stride) * stride), (GREY,) * 3)
    offset = (canvas.width - width) // 2, (canvas.height - height) // 2
    canvas.paste(image.resize((width, height), Image.Resampling.BILINEAR), offset)
    pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255
    return pixels, scale, offset


def load_sample(image: TrueImage, imgsz: int, stride: int = 32) -> tuple[Tensor, Tensor]:
    """One image and its boxes on it, (3, h, w) and (n, 4) pixel x1 y1 x2 y2; see :func:`load_letterboxed`."""
    pixels, scale, offset = load_letterboxed(image.file, imgsz, stride)
    boxes = torch.from_numpy(image.boxes[~image.crowd]).float().reshape(-1, 4)
    corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    return pixels, corners * scale + torch.tensor(offset * 2, dtype=torch.float32)
