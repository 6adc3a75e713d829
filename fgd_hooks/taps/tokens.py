"""Levels of detectors with a transformer: the tokens that an encoder returns, as maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from fgd_hooks.errors import LayoutError
from fgd_hooks.taps.candidates import Place
from fgd_hooks.taps.canvas import Size, stride_of
from fgd_hooks.taps.chooser import Chooser
from fgd_hooks.taps.layout import Layout, infer_layout
from fgd_hooks.taps.observation import Leaf, ModuleCall, Observation, leaves
from fgd_hooks.taps.tap import Tap


class ImagePath:
    """Which modules an image batch goes into, and what layout the features behind them have.

    Args:
        model: the model that was observed.
        seen: one forward pass of it.
    """

    def __init__(self, model: nn.Module, seen: Observation) -> None:
        self.model = model
        self.canvas = seen.canvas
        self.sizes: dict[str, Size] = {"": seen.canvas}  # (h, w) of the images that go into modules
        for call in seen.calls:
            leaf = call.inputs[0][2] if call.inputs else None
            if isinstance(leaf, Leaf) and len(leaf.shape) == 4 and leaf.shape[1] == seen.channels:
                size = (leaf.shape[2], leaf.shape[3])
                if size == seen.canvas or _takes_images(model.get_submodule(call.module), seen.channels):
                    self.sizes.pop(call.module, None)
                    self.sizes[call.module] = size

    def prefix(self, module: str) -> int | None:
        """What the innermost model around a module says about its tokens without a place (timm's do)."""
        return self._said(module, lambda part: getattr(part, "num_prefix_tokens", None))

    def suffix(self, module: str) -> int:
        """What the innermost model around a module says about tokens behind those of the image (YOLOS)."""
        return (
            self._said(module, lambda part: getattr(getattr(part, "config", None), "num_detection_tokens", None)) or 0
        )

    def says(self, module: str) -> bool:
        """Whether the model says which of its tokens have a place."""
        return self.prefix(module) is not None or self.suffix(module) > 0

    def _said(self, module: str, attribute: Callable[[nn.Module], Any]) -> int | None:
        for name in _around(module):
            number = attribute(self.model.get_submodule(name))
            if isinstance(number, int):
                return number
        return None

    def source(self, module: str) -> str:
        """The module that the images go into on their way to another: the last one in the closest part around both.

        That is the patch embedding as a rule. It runs whatever method of the model is called (``forward_features``).
        """
        for part in _around(module):
            inside = [name for name in self.sizes if not part or name == part or name.startswith(f"{part}.")]
            if inside:
                return inside[-1]
        return ""

    def with_layout(self, tap: Tap, value: Any) -> Tap:
        """The tap with the layout of what it saw, a tensor or another thing with a shape.

        Raises:
            LayoutError: the layout cannot be told.
        """
        layout, source = tap.layout, self.source(tap.module)
        if layout is None:
            canvas = self.sizes[source] if len(getattr(value, "shape", ())) == 3 else self.canvas
            known, behind = self.prefix(tap.module), self.suffix(tap.module)
            if behind and known is None:
                known = 1  # a class token comes first
            try:
                layout = infer_layout(value, canvas, known, behind)
            except LayoutError:
                if not known:
                    raise
                layout = infer_layout(value, canvas, 0)  # before the class token is put in front
        if layout is not None and layout.cell is not None:
            layout = replace(layout, images=source)
        return replace(tap, layout=layout)


def _around(module: str) -> Iterator[str]:
    """A module's name, then those of the modules around it, the whole model (empty) last."""
    while module:
        yield module
        module = module.rpartition(".")[0]
    yield ""


def _takes_images(module: nn.Module, channels: int) -> bool:
    return any(isinstance(each, nn.Conv2d) and each.in_channels == channels for each in module.modules())


def last_tokens(chooser: Chooser, path: ImagePath) -> list[tuple[Tap, Place]]:
    """The last tokens of a vision transformer that says how many of them have no place; empty for another model.

    They are as wide as those before (a head's output is not).
    """
    found: list[tuple[Tap, Place]] = []
    for call in sorted(chooser.seen.calls, key=lambda each: each.end):
        for where, leaf in leaves(call.output):
            if len(leaf.shape) != 3 or leaf.shape[0] != chooser.seen.count:
                continue
            if not path.says(call.module):
                continue
            if found and found[0][1].leaf.shape[2] != leaf.shape[2]:
                continue
            try:
                tap = path.with_layout(Tap(call.module, "output", where), leaf)
            except LayoutError:
                continue
            found = [(tap, Place(call, "output", where, leaf))]
    return found


class Memory:
    """What an encoder of tokens returns and a decoder looks things up in, and the maps that the tokens were made of.

    Attributes:
        tokens: where the encoder's output is; None: there is no such encoder.
        maps: the map of each level before the encoder, finest first.
    """

    def __init__(self, chooser: Chooser) -> None:
        self.tokens: Place | None = None
        self.maps: list[Place] = []
        seen = chooser.seen
        if not seen.traced:
            return
        memories = _looked_up(seen)
        inside = -1  # the end of the calls that look things up in the tokens found so far
        made = [
            Place(call, "output", where, leaf)
            for call in seen.calls
            for where, leaf in leaves(call.output)
            if call.module and chooser.size(leaf)
        ]
        returned = [(leaf, where, call) for call in seen.calls for where, leaf in leaves(call.output)]
        for leaf, where, call in sorted(returned, key=lambda each: each[0].number):
            if leaf.number not in memories or leaf.number < inside or leaf.number == getattr(self.tokens, "number", -1):
                continue
            before = [place for place in made if place.number < call.start and seen.depends(leaf.number, place.number)]
            maps = _tiling(leaf.shape[1], before, chooser)
            if maps:
                self.tokens, self.maps = Place(call, "output", where, leaf), maps
                inside = max(each.end for each in memories[leaf.number])

    def taps(self, path: ImagePath) -> list[Tap]:
        """A tap for each level of the encoder's output."""
        if self.tokens is None:
            return []
        call, where = self.tokens.call, self.tokens.path
        cells = tuple(stride_of(place.leaf.shape[2:], path.canvas) for place in self.maps)  # type: ignore[arg-type]
        source = path.source(call.module)
        return [
            Tap(call.module, "output", where, Layout(cell, 0, source, 0, cells[:number], cells[number + 1 :]))
            for number, cell in enumerate(cells)
        ]


def _looked_up(seen: Observation) -> dict[int, list[ModuleCall]]:
    """Tokens by number that modules take as a later argument, their first being other tokens; with these calls."""
    found: dict[int, list[ModuleCall]] = {}
    for call in seen.calls:
        first = next((tree for io, _, tree in call.inputs if io == "input"), None)
        for io, _, tree in call.inputs:
            if (
                io != "input"
                and isinstance(tree, Leaf)
                and len(tree.shape) == 3
                and tree.shape[0] == seen.count
                and not (isinstance(first, Leaf) and first.shape[1] == tree.shape[1])
            ):
                found.setdefault(tree.number, []).append(call)
    return found


def _tiling(length: int, before: list[Place], chooser: Chooser) -> list[Place]:
    """The last map of each of some neighbouring sizes, finest first, whose cells are so many in all."""
    last = {chooser.size(place.leaf): place for place in sorted(before, key=lambda each: each.number)}
    sizes: list[Size] = sorted((size for size in last if size), reverse=True)
    for start in range(len(sizes)):
        for end in range(len(sizes), start, -1):
            if sum(rows * columns for rows, columns in sizes[start:end]) == length:
                return [_first_to_return(last[size], before) for size in sizes[start:end]]
    return []


def _first_to_return(place: Place, before: list[Place]) -> Place:
    """Of the modules that return a map one after the other, from inside out, the outermost."""
    same = [each for each in before if each.number == place.number]
    return min(same, key=lambda each: each.call.start)
