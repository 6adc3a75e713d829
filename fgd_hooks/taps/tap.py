"""Taps by name: which module's input or output is meant, and which entry of a list or dict found there.

A tap names a module, says whether its input or its output is meant, and may index into a list, tuple or dict found
there. In text form: ``module[:input|:output][index]...[@layout]``, for example

    neck.fpn.2                 the output of the module ``neck.fpn.2``
    model.23:input[1]          the second feature map that feeds the module ``model.23``
    backbone:output[pool]      the entry ``pool`` of the dict that ``backbone`` returns
    neck.out_convs.*           one tap for each module that the glob matches
    blocks.11@16+1             tokens of 16 x 16 pixels after one class token (see fgd_hooks/taps/tap.py)

The module name may be a glob when taps are given by the user; :func:`expand_taps` resolves it.
"""

from __future__ import annotations

import copy
import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fgd_hooks.errors import LayoutError, TapError
from fgd_hooks.utils.modules import unwrap
from fgd_hooks.utils.registry import suggestion

Index = int | str


_NUMBER = re.compile(r"-?\d+")


_TAP_TEXT = re.compile(
    r"^(?P<module>[^:\[\]@]*)(?::(?P<io>input|output))?(?P<indices>(?:\[[^\[\]]+\])*)(?:@(?P<layout>.+))?$"
)


@dataclass(frozen=True)
class Tap:
    """Where one feature map is found.

    Args:
        module: name as in ``model.named_modules()``; empty for the model itself.
        io: ``"output"`` of the module, or its first ``"input"`` (the first keyword argument where it has no other).
        index: keys into nested lists, tuples or dicts, outermost first.
        layout: of tokens and channels-last maps; None: a map (N, C, H, W), or not known before the probe.
    """

    module: str
    io: Literal["input", "output"] = "output"
    index: tuple[Index, ...] = ()
    layout: Layout | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, text: str) -> Tap:
        """Read the text form, ``module[:input|:output][index]...[@layout]``.

        Raises:
            TapError: the text does not have that form.
        """
        match = _TAP_TEXT.match(text)
        if match is None:
            raise TapError(
                f"The tap {text!r} cannot be read. Expected module[:input|:output][index]...[@layout], "
                "for example 'neck.fpn.2', 'model.23:input[1]', 'backbone[pool]' or 'blocks.11@16+1'."
            )
        try:
            layout = None if match["layout"] is None else Layout.parse(match["layout"])
        except LayoutError as error:
            raise TapError(f"The tap {text!r} cannot be read: {error}.") from None
        keys = re.findall(r"\[([^\[\]]+)\]", match["indices"])
        index = tuple(int(key) if _NUMBER.fullmatch(key) else key.strip("'\"") for key in keys)
        return cls(match["module"], "input" if match["io"] == "input" else "output", index, layout)

    def __str__(self) -> str:
        io = ":input" if self.io == "input" else ""
        # a text that reads as a number is quoted, as parse() takes it
        keys = [repr(key) if isinstance(key, str) and _NUMBER.fullmatch(key) else key for key in self.index]
        layout = f"@{self.layout}" if self.layout else ""
        return f"{self.module or '(model)'}{io}{''.join(f'[{key}]' for key in keys)}{layout}"


def expand_taps(model: nn.Module, taps: Sequence[str | Tap]) -> list[Tap]:
    """Resolve texts and globs to taps of existing modules, in the order given (globs: order of definition).

    Raises:
        TapError: no module has that name; the message lists the nearest module names.
    """
    names = [name for name, _ in unwrap(model).named_modules()]
    expanded: list[Tap] = []
    for given in taps:
        tap = Tap.parse(given) if isinstance(given, str) else given
        if tap.module in names:
            matches = [tap.module]
        else:
            matches = [name for name in names if name and fnmatch.fnmatchcase(name, tap.module)]
        if not matches:
            raise TapError(
                f"The tap {given!s} names no module of {type(unwrap(model)).__name__}. "
                + suggestion(tap.module, [name for name in names if name])
            )
        expanded += [replace(tap, module=name) for name in matches]
    return expanded


def describe(value: object) -> str:
    """One line on what a tap saw, for error messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {list(value)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}: " + ", ".join(describe(item) for item in value[:6])
    return f"an object of type {type(value).__name__}"


Size = tuple[int, int]


_TEXT = re.compile(r"nhwc|(?P<cell>[1-9]\d*)(?:\+(?P<prefix>\d+))?")


MOST_PREFIXES = 16  # class, distillation and register tokens that are looked for where the model does not say


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
