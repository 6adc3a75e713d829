"""Features that are no (N, C, H, W) map yet: tokens of a vision transformer, and channels-last maps.

In the text of a tap a layout stands at the end, behind ``@``:

    blocks.11@16+1     tokens (N, L, C), one for each 16 x 16 pixels, row by row, after 1 token that has no place
    stages.2@nhwc      a map (N, H, W, C)

Without it the probe finds out (see :func:`infer_layout`).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Size = tuple[int, int]
_TEXT = re.compile(r"nhwc|(?P<cell>[1-9]\d*)(?:\+(?P<prefix>\d+))?")
MOST_PREFIXES = 16  # class, distillation and register tokens that are looked for where the model does not say


class LayoutError(ValueError):
    """A feature that does not have the layout which is expected of it."""


@dataclass(frozen=True)
class Layout:
    """How a feature becomes a map (N, C, H, W), and a map this feature again.

    Args:
        cell: side in pixels of the square that a token stands for; None: a channels-last map (N, H, W, C).
        prefix: tokens before those of the image (class, distillation, registers).
        images: name of the module whose input, a batch of images, the tokens are made of; empty: the model.
    """

    cell: int | None = None
    prefix: int = 0
    images: str = ""

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read ``nhwc``, ``16`` or ``16+1``.

        Raises:
            LayoutError: the text has another form.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise LayoutError(f"the layout {text!r} cannot be read; expected nhwc, or cell+prefix such as 16+1")
        return cls() if match["cell"] is None else cls(int(match["cell"]), int(match["prefix"] or 0))

    def __str__(self) -> str:
        return "nhwc" if self.cell is None else f"{self.cell}+{self.prefix}"

    def to_map(self, feature: Tensor, images: Size | None) -> Tensor:
        """The map (N, C, H, W), a view of the feature.

        Args:
            feature: (N, L, C) tokens, or (N, H, W, C).
            images: (h, w) in pixels of the batch that the tokens are made of.

        Raises:
            LayoutError: the feature has another shape than this layout says.
        """
        if self.cell is None:
            if feature.ndim != 4:
                raise LayoutError("expected a channels-last map (N, H, W, C)")
            return feature.permute(0, 3, 1, 2)
        if feature.ndim != 3:
            raise LayoutError("expected tokens (N, L, C)")
        if images is None:
            raise LayoutError("the size of the images that the tokens stand for is not known")
        grid = self.grid(int(feature.shape[1]), images)
        tokens: Tensor = feature[:, self.prefix :].transpose(1, 2)
        return tokens.reshape(*tokens.shape[:2], *grid)

    def from_map(self, feature: Tensor, original: Tensor) -> Tensor:
        """The feature again: a map that :meth:`to_map` made of ``original``, with the prefix tokens of that."""
        if self.cell is None:
            return feature.permute(0, 2, 3, 1)
        tokens = feature.flatten(2).transpose(1, 2)
        return torch.cat([original[:, : self.prefix], tokens], 1) if self.prefix else tokens

    def grid(self, length: int, images: Size) -> Size:
        """Rows and columns of so many tokens over images of (h, w) pixels.

        Raises:
            LayoutError: they do not fill a grid.
        """
        cell = self.cell or 1
        # a patch at the border that is not full is left out, or padded
        for grid in ((images[0] // cell, images[1] // cell), (-(-images[0] // cell), -(-images[1] // cell))):
            if grid[0] * grid[1] + self.prefix == length:
                return grid
        rows, columns = images[0] / cell, images[1] / cell
        raise LayoutError(
            f"{length} tokens do not cover images of {images[0]} x {images[1]} pixels with one for each {cell} x "
            f"{cell} pixels ({rows:g} x {columns:g}) after {self.prefix} without a place"
        )


def fits(size: Sequence[int], canvas: Size) -> bool:
    """Whether a map of (h, w) cells covers a canvas with square cells of a whole number of pixels."""
    height, width = int(size[0]), int(size[1])
    steps = {math.floor(canvas[0] / height), math.ceil(canvas[0] / height)} if height and width else set()
    return any(
        step > 0
        and all(n in (pixels // step, -(-pixels // step)) for n, pixels in zip((height, width), canvas, strict=True))
        for step in steps
    )


def infer_layout(feature: Any, canvas: Size, prefix: int | None = None) -> Layout | None:
    """The layout of a feature that was seen for a canvas of (h, w) pixels; None for a map (N, C, H, W).

    A 4-D feature is channels-last where its second and third dimension cover the canvas with square cells and its last
    two do not. Tokens must fill a grid of square cells after ``prefix`` others.

    Args:
        feature: what a tap saw.
        canvas: (h, w) in pixels of the images.
        prefix: number of tokens without a place; None: not known, and found where one number alone is possible.

    Raises:
        LayoutError: tokens that fit no grid, or several.
    """
    if not isinstance(feature, Tensor) or feature.ndim not in (3, 4):
        return None
    if feature.ndim == 4:
        return Layout() if fits(feature.shape[1:3], canvas) and not fits(feature.shape[2:], canvas) else None
    length = int(feature.shape[1])
    numbers = range(MOST_PREFIXES + 1) if prefix is None else [prefix]
    # cells that are no divisor of the canvas come from patches that a model pads or leaves out: told apart by text only
    cells = [cell for cell in range(1, min(canvas) + 1) if canvas[0] % cell == 0 and canvas[1] % cell == 0]
    found = [
        Layout(cell, number)
        for number in numbers
        for cell in cells
        if (canvas[0] // cell) * (canvas[1] // cell) + number == length
    ]
    if len(found) == 1:
        return found[0]
    possible = f"several are possible: {', '.join(map(str, found))}" if found else "no square cell gives that number"
    raise LayoutError(
        f"{length} tokens over images of {canvas[0]} x {canvas[1]} pixels: {possible}. Say it in the tap: "
        "'blocks.11@16+1' means one token for each 16 x 16 pixels, after 1 that has no place"
    )


def replaced(container: Any, keys: Sequence[int | str], value: Any) -> Any:
    """The container with another value at nested keys; the containers on the way are shallow copies."""
    if not keys:
        return value
    inner = replaced(container[keys[0]], keys[1:], value)
    if isinstance(container, tuple):
        items = list(container)
        items[int(keys[0])] = inner
        return type(container)(*items) if hasattr(container, "_fields") else tuple(items)
    container = copy.copy(container)
    container[keys[0]] = inner
    return container
