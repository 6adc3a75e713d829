"""How maps of cells lie over a canvas of pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

Size = tuple[int, int]

LOST = 4  # cells at most that convolutions without padding take from each side of a map, or padding adds
POWERS = [2**exponent for exponent in range(10)]


def fits(size: Sequence[int], canvas: Size) -> bool:
    """Whether a map of (h, w) cells covers a canvas with square cells of a whole number of pixels."""
    height, width = int(size[0]), int(size[1])
    steps = {math.floor(canvas[0] / height), math.ceil(canvas[0] / height)} if height and width else set()
    return any(_is_grid((height, width), canvas, step) for step in steps)


def _is_grid(size: Size, canvas: Size, step: int) -> bool:
    """Whether a map has a cell for each ``step`` x ``step`` pixels; one that is not full may be left out."""
    return step > 0 and all(n in (p // step, -(-p // step)) for n, p in zip(size, canvas, strict=True))


def covers(size: Sequence[int], canvas: Size) -> bool:
    """Whether a map may be a feature map of a canvas: it :func:`fits`, or has a few cells less or more on each side."""
    height, width = int(size[0]), int(size[1])
    if (height, width) == (1, 1) and min(canvas) > 64:
        return False  # pooled
    if fits((height, width), canvas):
        return True
    if min(height, width) < LOST:
        return False
    for step in POWERS[1:]:
        lost = [pixels / step - cells for cells, pixels in zip((height, width), canvas, strict=True)]
        if all(abs(each) <= LOST for each in lost) and abs(lost[0] - lost[1]) < 1:
            return canvas[0] != canvas[1] or height == width
    return False


def stride_of(size: Size, canvas: Size) -> int:
    """Pixels per cell: the power of two that gives maps of this size, if one does, else the nearest whole number."""
    measured = math.sqrt(canvas[0] / size[0] * canvas[1] / size[1])
    power: int = min(POWERS, key=lambda step: abs(math.log2(step / measured)))
    whole = max(1, round(measured))
    near = abs(math.log2(power / measured)) < 0.2
    return power if near and (_is_grid(size, canvas, power) or not _is_grid(size, canvas, whole)) else whole
