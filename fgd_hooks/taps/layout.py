"""How tokens and channels-last features become maps (N, C, H, W), and maps these features again."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fgd_hooks.errors import LayoutError
from fgd_hooks.taps.canvas import Size, fits

_TEXT = re.compile(r"nhwc|(?P<cells>[\d/()]+)(?:\+(?P<prefix>\d+))?(?:\+(?P<suffix>\d+))?")
_CELLS = re.compile(r"(?P<before>(?:[1-9]\d*/)*)\((?P<cell>[1-9]\d*)\)(?P<after>(?:/[1-9]\d*)*)|(?P<only>[1-9]\d*)")


MOST_PREFIXES = 16  # class, distillation and register tokens that are looked for where the model does not say


@dataclass(frozen=True)
class Layout:
    """How a feature becomes a map (N, C, H, W), and a map this feature again.

    As text: ``nhwc``; ``16`` or ``16+1`` for tokens of 16 x 16 pixels, after one other; ``16+1+100`` with 100 others
    behind; ``8/(16)/32`` for those of 16 x 16 pixels among tokens of several levels, finest first.

    Args:
        cell: side in pixels of the square that a token stands for; None: a channels-last map (N, H, W, C).
        prefix: tokens before those of the image (class, distillation, registers).
        images: name of the module whose input, a batch of images, the tokens are made of; empty: the model.
        suffix: tokens behind those of the image (of detections).
        before: cells of the levels whose tokens come before those of this level.
        after: the same for those behind.
    """

    cell: int | None = None
    prefix: int = 0
    images: str = ""
    suffix: int = 0
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read the text form.

        Raises:
            LayoutError: the text has another form.
        """
        match = _TEXT.fullmatch(text)
        cells = match and match["cells"] and _CELLS.fullmatch(match["cells"])
        if match is None or (match["cells"] and not cells):
            raise LayoutError(
                f"the layout {text!r} cannot be read; expected nhwc, or cell+prefix such as 16+1, or 8/(16)/32"
            )
        if not cells:
            return cls()
        before, after = (
            tuple(int(cell) for cell in (cells[side] or "").split("/") if cell) for side in ("before", "after")
        )
        cell = int(cells["cell"] or cells["only"])
        return cls(cell, int(match["prefix"] or 0), "", int(match["suffix"] or 0), before, after)

    def __str__(self) -> str:
        if self.cell is None:
            return "nhwc"
        cells = [*map(str, self.before), f"({self.cell})" if self.before or self.after else str(self.cell)]
        suffix = f"+{self.suffix}" if self.suffix else ""
        return "/".join([*cells, *map(str, self.after)]) + f"+{self.prefix}{suffix}"

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
        start, grid = self._place(int(feature.shape[1]), images)
        tokens: Tensor = feature[:, start : start + grid[0] * grid[1]].transpose(1, 2)
        return tokens.reshape(*tokens.shape[:2], *grid)

    def from_map(self, feature: Tensor, original: Tensor, images: Size | None = None) -> Tensor:
        """The feature again: a map that :meth:`to_map` made of ``original``, with the other tokens of that."""
        if self.cell is None:
            return feature.permute(0, 2, 3, 1)
        tokens = feature.flatten(2).transpose(1, 2)
        length, whole = int(tokens.shape[1]), int(original.shape[1])
        if length == whole:
            return tokens
        start = self.prefix if images is None else self._place(whole, images)[0]
        return torch.cat([original[:, :start], tokens, original[:, start + length :]], 1)

    def grid(self, length: int, images: Size) -> Size:
        """Rows and columns of this level among so many tokens over images of (h, w) pixels.

        Raises:
            LayoutError: they do not fill a grid.
        """
        return self._place(length, images)[1]

    def _place(self, length: int, images: Size) -> tuple[int, Size]:
        """The first token of this level, and its rows and columns."""
        cells = (*self.before, self.cell or 1, *self.after)
        for full in (True, False):  # a patch at the border that is not full is left out, or padded
            grids = [tuple(side // cell if full else -(-side // cell) for side in images) for cell in cells]
            counts = [rows * columns for rows, columns in grids]
            if sum(counts) + self.prefix + self.suffix == length:
                number = len(self.before)
                return self.prefix + sum(counts[:number]), (grids[number][0], grids[number][1])
        cell = self.cell or 1
        rows, columns = images[0] / cell, images[1] / cell
        others = f", those of other levels and {self.suffix} more" if self.before or self.after or self.suffix else ""
        raise LayoutError(
            f"{length} tokens do not cover images of {images[0]} x {images[1]} pixels with one for each {cell} x "
            f"{cell} pixels ({rows:g} x {columns:g}) after {self.prefix} without a place{others}"
        )


def infer_layout(feature: Any, canvas: Size, prefix: int | None = None, suffix: int = 0) -> Layout | None:
    """The layout of a feature that was seen for a canvas of (h, w) pixels; None for a map (N, C, H, W).

    A 4-D feature is channels-last where its second and third dimension cover the canvas with square cells and its last
    two do not. Tokens must fill a grid of square cells after ``prefix`` others.

    Args:
        feature: what a tap saw; anything with a shape.
        canvas: (h, w) in pixels of the images.
        prefix: number of tokens without a place; None: not known, and found where one number alone is possible.
        suffix: the same behind the others.

    Raises:
        LayoutError: tokens that fit no grid, or several.
    """
    shape = tuple(getattr(feature, "shape", ()))
    if len(shape) == 4:
        return Layout() if fits(shape[1:3], canvas) and not fits(shape[2:], canvas) else None
    if len(shape) != 3:
        return None
    length = shape[1] - suffix
    numbers = range(MOST_PREFIXES + 1) if prefix is None else [prefix]
    # cells that are no divisor of the canvas come from patches that a model pads or leaves out: told apart by text only
    cells = [cell for cell in range(1, min(canvas) + 1) if canvas[0] % cell == 0 and canvas[1] % cell == 0]
    found = [
        Layout(cell, number, suffix=suffix)
        for number in numbers
        for cell in cells
        if (canvas[0] // cell) * (canvas[1] // cell) + number == length
    ]
    if len(found) == 1:
        return found[0]
    possible = f"several are possible: {', '.join(map(str, found))}" if found else "no square cell gives that number"
    raise LayoutError(
        f"{shape[1]} tokens over images of {canvas[0]} x {canvas[1]} pixels: {possible}. Say it in the tap: "
        "'blocks.11@16+1' means one token for each 16 x 16 pixels, after 1 that has no place"
    )
