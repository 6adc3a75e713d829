"""A model's feature levels, found or named, and measured by a forward pass that leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fgd_hooks.errors import LayoutError, PairingError, TapError
from fgd_hooks.taps.candidates import Candidate, Place
from fgd_hooks.taps.canvas import Size, stride_of
from fgd_hooks.taps.chooser import Chooser
from fgd_hooks.taps.hooks import FeatureTaps, run_until_tapped
from fgd_hooks.taps.layout import MOST_PREFIXES, Layout
from fgd_hooks.taps.observation import Leaf, ModuleCall, Observation, Path, Tree, leaves
from fgd_hooks.taps.probe import fixed_size, probes
from fgd_hooks.taps.tap import Tap, expand_taps
from fgd_hooks.taps.tokens import ImagePath, Memory, last_tokens
from fgd_hooks.utils.modules import unwrap
from fgd_hooks.utils.preserve import preserve

BEFORE_ENCODER = "before-encoder"
"""In place of taps: the maps that a detector's encoder of tokens takes, instead of those that it returns."""


TOKENS = (16, 14, 32, 8, 12, 4)
"""Pixels of a token's side that are common, the commonest first; for messages."""


@dataclass(frozen=True)
class Level:
    """One feature level of a model.

    Args:
        tap: where it is captured.
        channels: C of its (N, C, H, W) map.
        stride: input pixels per cell.
        size: (H, W) of the map at the probe.
        canvas: (h, w) in pixels of the probe's images.
    """

    tap: Tap
    channels: int
    stride: int
    size: Size
    canvas: Size = (0, 0)

    @property
    def name(self) -> str:
        """``P3`` for stride 8 and so on; ``S12`` for a stride that is no power of two."""
        exponent = math.log2(self.stride)
        return f"P{int(exponent)}" if exponent.is_integer() else f"S{self.stride}"


def common_size(models: Sequence[nn.Module]) -> Size | None:
    """The (h, w) of images that all models take; None where each takes any.

    Raises:
        PairingError: two of them take images of one size each, and not of the same.
    """
    sizes = list(dict.fromkeys(size for size in map(fixed_size, models) if size is not None))
    if len(sizes) > 1:
        found = " and ".join(f"{height} x {width}" for height, width in sizes)
        raise PairingError(
            f"Student and teacher see the same images, but they take {found} pixels only. Make one for the other's "
            "size: timm.create_model(..., img_size=...), or dynamic_img_size=True."
        )
    return sizes[0] if sizes else None


def find_levels(
    model: nn.Module,
    taps: Sequence[str | Tap] | None = None,
    *,
    example: Any = None,
    role: str = "model",
    size: Size | None = None,
) -> list[Level]:
    """The feature levels of a model, finest first, measured by a forward pass that leaves no trace.

    Args:
        model: any detector or backbone.
        taps: where the levels are (names, globs, :class:`Tap`); a tap that holds several maps gives a level for each.
            None: the maps that the head works on, the last that are given to a module as a list (or to calls of one
            module, or as three and more arguments), or returned as one and used by modules later. Of a detector with
            an encoder of tokens (the DETR family): what the encoder returns; ``["before-encoder"]``: what it takes. Of
            a plain vision transformer that says how many tokens have no place: its last tokens.
        example: what the model is called with, in any form of :func:`fgd_hooks.taps.calls.call_model`; None: zeros,
            of sizes and channels that the model may take. The size of its first images is the canvas against which
            strides are measured.
        role: "student" or "teacher", for messages.
        size: (h, w) of the zeros that are tried first.

    Raises:
        TapError: the model cannot be run, a tap names no module, did not fire or holds no feature map, or no levels
            were found.
    """
    model = unwrap(model)
    named = None if taps is None or list(taps) == [BEFORE_ENCODER] else expand_taps(model, taps)
    with preserve(model, probe=True):
        passes = probes(model, example, role, size, named)
        for inputs, seen in passes:
            if named is not None:
                resolved_taps = _layouts(model, named, seen, role)
                _check_tokens(named, resolved_taps, ImagePath(model, seen), seen, passes, role)
                levels = _measured(model, resolved_taps, inputs, seen, role)
            else:
                levels = _found(model, seen, encoder=taps is None)
            if levels:
                return sorted(levels, key=lambda level: level.stride)
    raise TapError(
        f"No feature levels were found in the {role} ({type(model).__name__}): no list or dict of feature maps of "
        f"different sizes is given to a module, or returned and used by modules later. Name the taps, for example "
        f"{_fitting(seen)}."
    )


# Levels that are found


def _found(model: nn.Module, seen: Observation, encoder: bool = True) -> list[Level]:
    """The levels of a model, in no order; none where it has none."""
    chooser = Chooser(seen)
    path = ImagePath(model, seen)
    best = chooser.best()
    memory = Memory(chooser)
    if memory.tokens is not None and (best is None or not encoder or memory.tokens.number > best.birth):
        if not encoder:
            return [_level(chooser, place, path) for place in memory.maps]
        return [
            Level(
                tap, memory.tokens.leaf.shape[2], tap.layout.cell or 1, chooser.size(place.leaf) or (0, 0), seen.canvas
            )
            for tap, place in zip(memory.taps(path), memory.maps, strict=True)
            if tap.layout
        ]
    if best is None or len({chooser.size(place.leaf) for place in best.places}) == 1:
        tokens = last_tokens(chooser, path)
        if tokens and (best is None or not best.strong):
            return [_token_level(tap, place.leaf, seen.canvas) for tap, place in tokens]
    return [] if best is None else [_level(chooser, place, path) for place in _places(best, chooser)]


def _places(best: Candidate, chooser: Chooser) -> list[Place]:
    """Where to take the maps: as early as a single module returns them."""
    calls = [call for call in chooser.seen.calls if call.module and chooser.seen.runs(call.module) == 1]
    if best.kind == "own":
        for call in sorted(calls, key=lambda each: each.end):
            inside = {leaf.number: path for path, leaf in leaves(call.output)}
            if isinstance(call.output, list) and best.numbers <= inside.keys():
                return [replace(p, call=call, path=inside[p.number]) for p in best.places]
    if best.kind in ("calls", "branches"):
        made = {call.output.number: call for call in reversed(calls) if isinstance(call.output, Leaf)}
        return [replace(p, call=made[p.number], io="output") if p.number in made else p for p in best.places]
    return best.places


def _level(chooser: Chooser, place: Place, path: ImagePath) -> Level:
    seen, leaf = chooser.seen, place.leaf
    tap = path.with_layout(_tap(place, seen), leaf) if len(leaf.shape) == 4 else _tap(place, seen)
    size = chooser.size(leaf) or (leaf.shape[2], leaf.shape[3])
    return Level(tap, chooser.width(leaf), stride_of(size, seen.canvas), size, seen.canvas)


def _tap(place: Place, seen: Observation) -> Tap:
    call = place.call
    runs = seen.runs(call.module)
    return Tap(
        call.module,
        place.io,  # type: ignore[arg-type]
        place.path,
        call=call.number if runs > 1 else None,
        runs=runs,
        rewritten=_rewritten(place.number, place.io, call, seen),
    )


def _rewritten(number: int, io: str, call: ModuleCall, seen: Observation) -> bool:
    return seen.flow.changed.get(number, -1) > (call.end if io == "output" else call.start)


def _token_level(tap: Tap, leaf: Leaf, canvas: Size) -> Level:
    layout = tap.layout
    assert layout is not None and layout.cell is not None  # tokens that have a layout have a cell
    return Level(tap, leaf.shape[2], layout.cell, layout.grid(leaf.shape[1], canvas), canvas)


def _fitting(seen: Observation) -> str:
    """Taps that would do: for each stride the last module that returns a map which covers the images, or its tokens."""
    chooser = Chooser(seen)
    last: dict[int, tuple[str, int]] = {}
    for call in sorted(seen.calls, key=lambda each: each.end):
        if not call.module or not isinstance(call.output, Leaf):
            continue
        if size := chooser.size(call.output):
            last[stride_of(size, seen.canvas)] = (call.module, chooser.width(call.output))
        elif layout := _likely_layout(call.output, seen):
            last[layout.cell or 1] = (f"{call.module}@{layout}", call.output.shape[2])
    if not last:
        return "['neck.p3', 'neck.p4', 'neck.p5']"
    taps = [(stride, *last[stride]) for stride in sorted(last)][-4:]
    listed = ", ".join(f"{name} (stride {stride}, {width} channels)" for stride, name, width in taps)
    return f"{[name for _, name, _ in taps[-3:]]}; maps that cover the images come last from {listed}"


def _likely_layout(leaf: Leaf, seen: Observation) -> Layout | None:
    """The layout of tokens (N, L, C) of which a few at most have no place, as vision transformers have them."""
    if len(leaf.shape) != 3 or leaf.shape[0] != seen.count or not seen.of_images(leaf.number):
        return None
    for cell in TOKENS:
        before = leaf.shape[1] - (seen.canvas[0] // cell) * (seen.canvas[1] // cell)
        if 0 <= before <= MOST_PREFIXES:
            return Layout(cell, before)
    return None


# Levels that are named


def _layouts(model: nn.Module, named: Sequence[Tap], seen: Observation, role: str) -> list[Tap]:
    """The taps, one for each map, with what the probe tells of them."""
    chooser, path = Chooser(seen), ImagePath(model, seen)
    taps: list[Tap] = []
    for tap in named:
        call = _call(tap, seen)
        if call is None:  # the real probe tells
            taps.append(tap)
            continue
        tree = _tree(call, tap)
        maps = [(where, leaf) for where, leaf in leaves(tree) if len(leaf.shape) == 4] if isinstance(tree, list) else []
        those = [(where, leaf) for where, leaf in maps if chooser.size(leaf)] or maps
        whole: list[tuple[Path, Tree | None]] = [*those] or [((), tree)]
        runs = seen.runs(tap.module)
        for where, leaf in whole:
            number = leaf.number if isinstance(leaf, Leaf) else -1
            each = replace(
                tap,
                index=(*tap.index, *where),
                call=call.number if runs > 1 else None,
                runs=runs,
                rewritten=_rewritten(number, tap.io, call, seen),
            )
            try:
                taps.append(path.with_layout(each, leaf))
            except LayoutError as error:
                shape = getattr(leaf, "shape", ())
                raise TapError(
                    f"The {role}'s tap {each} cannot be used: it saw a tensor of shape {shape}; {error}."
                ) from None
    return taps


def _check_tokens(
    named: Sequence[Tap],
    taps: list[Tap],
    path: ImagePath,
    seen: Observation,
    passes: Iterator[tuple[Any, Observation]],
    role: str,
) -> None:
    """Refuse tokens whose number does not go with the size of the images (queries), where the model takes another.

    Raises:
        TapError: names the tap.
    """
    said = {tap.module for tap in named if tap.layout is not None}
    guessed = [
        tap
        for tap in taps
        if tap.layout is not None and tap.layout.cell and tap.module not in said and not path.says(tap.module)
    ]
    other = next((other for _, other in passes if other.canvas != seen.canvas), None) if guessed else None
    for tap in guessed if other is not None else ():
        one, two = tapped(tap, seen), tapped(tap, other)  # type: ignore[arg-type]
        if one is not None and two is not None and one.shape[1] == two.shape[1]:
            raise TapError(
                f"The {role}'s tap {replace(tap, layout=None)} cannot be used: it saw a tensor of shape {one.shape} "
                "for images of any size, so these are no tokens of an image. If they are, say it in the tap: "
                "'blocks.11@16+1' means one token for each 16 x 16 pixels, after 1 that has no place."
            )


def _call(tap: Tap, seen: Observation) -> ModuleCall | None:
    """The call of a module that a tap means.

    Raises:
        TapError: the module runs for several levels, or not so often.
    """
    calls = [call for call in seen.calls if call.module == tap.module]
    if not calls:
        return None
    if tap.call is not None:
        if tap.call >= len(calls):
            raise TapError(f"The tap {tap} cannot be used: its module runs {len(calls)} time(s) in one forward pass.")
        return calls[tap.call]
    shapes = {getattr(_tree(call, tap), "shape", None) for call in calls}
    if len(calls) > 1 and len(shapes) > 1:
        raise TapError(
            f"The module of the tap {tap} runs {len(calls)} times in one forward pass (shared by several levels?), so "
            f"it is not clear which of its maps is meant. Name a module that runs once, or one of the calls, for "
            f"example {replace(tap, call=0)}."
        )
    return calls[-1]


def _tree(call: ModuleCall, tap: Tap) -> Tree | None:
    """What a tap leads to; None where it leads to no tensor."""
    if tap.io == "output":
        return _inside(call.output, tap.index)
    for io, prefix, tree in call.inputs:
        if tap.io == "input" and io == "input":
            return _inside(tree, tap.index)
        if io == tap.io and tap.index[: len(prefix)] == prefix:
            return _inside(tree, tap.index[len(prefix) :])
    return None


def tapped(tap: Tap, seen: Observation) -> Leaf | None:
    """The tensor that a resolved tap sees in a pass; None where it sees none."""
    call = _call(tap, seen)
    tree = None if call is None else _tree(call, tap)
    return tree if isinstance(tree, Leaf) else None


def _inside(tree: Tree | None, keys: Sequence[int | str]) -> Tree | None:
    for key in keys:
        if not isinstance(tree, list):
            return None
        if isinstance(key, int) and key < 0 and tree:
            key += int(tree[-1][0]) + 1 if isinstance(tree[-1][0], int) else 0
        tree = dict(tree).get(key)
    return tree


def _measured(model: nn.Module, taps: list[Tap], inputs: Any, seen: Observation, role: str) -> list[Level]:
    with FeatureTaps(model, taps, role=role, stop=True) as probe:
        features: list[Tensor] = run_until_tapped(model, probe, inputs)
    levels = []
    for tap, feature in zip(taps, features, strict=True):
        size = (int(feature.shape[2]), int(feature.shape[3]))
        levels.append(Level(tap, int(feature.shape[1]), stride_of(size, seen.canvas), size, seen.canvas))
    return levels


def find_sources(model: nn.Module, taps: Sequence[Tap], *, example: Any = None) -> list[str | None]:
    """The module that returns the map which a tap sees, perhaps as the input of another (the layers that feed a head).

    Args:
        model: as for :func:`find_levels`.
        taps: resolved taps.
        example: as for :func:`find_levels`.

    Returns:
        One name per tap; None for a map that no module returns as it is (a sum, or an entry of a dict), and for a
        module that runs several times.
    """
    model = unwrap(model)
    sources: dict[Tap, str] = {
        tap: tap.module for tap in taps if tap.io == "output" and not tap.index and tap.runs == 1
    }
    if any(tap.io != "output" for tap in taps):
        with preserve(model, probe=True):
            _, seen = next(probes(model, example, taps=taps))
        made: dict[int, str] = {}
        for call in seen.calls:  # nested modules return one map; a shared activation runs often
            if isinstance(call.output, Leaf) and seen.runs(call.module) == 1:
                made.setdefault(call.output.number, call.module)
        for tap in taps:
            leaf = tapped(tap, seen) if tap.io != "output" else None
            if leaf is not None and leaf.number in made:
                sources[tap] = made[leaf.number]
    return [sources.get(tap) for tap in taps]
