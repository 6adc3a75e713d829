"""A model's feature levels, measured by a probe, and the pairing of student and teacher levels by stride."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fgd_hooks.errors import LayoutError, PairingError, TapError
from fgd_hooks.taps.hooks import FeatureTaps, first_argument, run_until_tapped
from fgd_hooks.taps.tap import Size, Tap, describe, expand_taps, fits, infer_layout
from fgd_hooks.utils.modules import unwrap
from fgd_hooks.utils.preserve import preserve

logger = logging.getLogger("fgd_hooks")


@dataclass(frozen=True)
class Level:
    """One feature level of a model.

    Args:
        tap: where it is captured.
        channels: C of its (N, C, H, W) map.
        stride: input pixels per cell.
        size: (H, W) of the map at the probe.
    """

    tap: Tap
    channels: int
    stride: int
    size: tuple[int, int]

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
    """The feature levels of a model, finest first, measured by one forward pass that leaves no trace.

    Args:
        model: any detector or backbone.
        taps: where the levels are (names, globs, :class:`Tap`); None: the maps that feed the model's head, found as
            the last list or dict of maps of different sizes that a module receives (or, where none does, returns);
            of a plain vision transformer of timm its last tokens. A tap that holds a list or dict of maps gives a
            level for each.
        example: what the model is called with; None: zeros of ``size`` pixels. Its first tensor's size is the canvas
            against which strides are measured.
        role: "student" or "teacher", for messages.
        size: (h, w) of the zeros; None: see :func:`probe_input`.

    Raises:
        TapError: a tap names no module, did not fire or holds no feature map, or no levels were found.
    """
    model = unwrap(model)
    if example is None:
        example = probe_input(model, size)
    canvas = _canvas(example)
    with preserve(model, probe=True):
        if taps is None:
            found = _find_head_inputs(model, example, role)
        else:
            named = _expand_collections(model, expand_taps(model, taps), example, role)
            with FeatureTaps(model, named, role=role, stop=True) as probe:
                found = list(zip(named, run_until_tapped(model, probe, example), strict=True))
    levels = [_measure(tap, feature, canvas) for tap, feature in found]
    return sorted(levels, key=lambda level: level.stride)


def find_sources(model: nn.Module, taps: Sequence[Tap], *, example: Any = None) -> list[str | None]:
    """The module that returns the map which a tap sees, perhaps as the input of another (the layers that feed a head).

    Args:
        model: as for :func:`find_levels`.
        taps: resolved taps.
        example: as for :func:`find_levels`.

    Returns:
        One name per tap; None for a map that no module returns as it is (a sum, or an entry of a dict).
    """
    model = unwrap(model)
    made: dict[int, tuple[Tensor, str]] = {}  # the tensors too: an id is reused once its owner is gone
    sources: dict[Tap, str] = {tap: tap.module for tap in taps if tap.io == "output" and not tap.index}

    def see(tap: Tap, value: Any) -> None:
        if tap.io == "output":
            if isinstance(value, Tensor):
                made[id(value)] = value, tap.module
            return
        for wanted in taps:
            if (wanted.module, wanted.io) == (tap.module, "input"):
                item = value
                for key in wanted.index:
                    item = item[key]
                if id(item) in made:
                    sources[wanted] = made[id(item)][1]

    if any(tap.io == "input" for tap in taps):
        with preserve(model, probe=True):
            observe(model, probe_input(model) if example is None else example, see)
    return [sources.get(tap) for tap in taps]


def _canvas(example: Any) -> tuple[int, int]:
    while isinstance(example, (list, tuple)):
        example = example[0]
    if not isinstance(example, Tensor):
        raise TapError(f"The probe's example must be a tensor or a list of tensors, not {type(example).__name__}.")
    return int(example.shape[-2]), int(example.shape[-1])


def _measure(tap: Tap, feature: Tensor, canvas: tuple[int, int]) -> Level:
    height, width = int(feature.shape[2]), int(feature.shape[3])
    stride = max(1, round(math.sqrt(canvas[0] / height * canvas[1] / width)))
    return Level(tap, int(feature.shape[1]), stride, (height, width))


def collection(value: Any) -> list[tuple[int | str, Tensor]] | None:
    """The maps of a list, tuple or dict of at least two feature maps of different sizes; None for anything else."""
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    else:
        return None
    maps = [(key, item) for key, item in items if isinstance(item, Tensor) and item.ndim == 4]
    sizes = {tuple(item.shape[2:]) for _, item in maps}
    return maps if len(maps) >= 2 and len(sizes) == len(maps) else None


def _find_head_inputs(model: nn.Module, example: Any, role: str) -> list[tuple[Tap, Tensor]]:
    inputs: list[tuple[Tap, Tensor]] = []
    outputs: list[tuple[Tap, Tensor]] = []
    single: list[tuple[Tap, Tensor]] = []
    images = ImagePath(model, _canvas(example))

    def see(tap: Tap, value: Any) -> None:
        images.see(tap, value)
        single[:] = _single_level(tap, value, images, single) or single
        maps = collection(value)
        if maps and not (tap.io == "input" and not tap.module):
            found = inputs if tap.io == "input" else outputs
            if not (tap.module or not found):
                return  # what the model itself returns counts only when no module inside returns levels
            found[:] = [(replace(tap, index=(key,)), item) for key, item in maps]

    failure = observe(model, example, see)
    if inputs or outputs:
        return [_as_map(images.with_layout(tap, item), item, images) for tap, item in inputs or outputs]
    if single and failure is None:
        return [_as_map(tap, item, images) for tap, item in single]
    if failure is not None:
        raise TapError(
            f"The probe of the {role} ({type(model).__name__}) failed: {failure}. Pass an example input that the "
            "model accepts, or name the taps."
        ) from failure
    raise TapError(
        f"No feature levels were found in the {role} ({type(model).__name__}): no module receives or returns a list "
        "or dict of feature maps of different sizes. Name the taps, for example ['neck.p3', 'neck.p4', 'neck.p5']."
    )


def _as_map(tap: Tap, item: Tensor, images: ImagePath) -> tuple[Tap, Tensor]:
    return tap, item if tap.layout is None else tap.layout.to_map(item, images.canvas)


def _single_level(
    tap: Tap, value: Any, images: ImagePath, before: list[tuple[Tap, Tensor]]
) -> list[tuple[Tap, Tensor]]:
    """What serves as the one level of a model without a pyramid, the last such value of a pass; empty for another.

    The tokens of a vision transformer that says how many of them have no place, as wide as ``before`` (a head's output
    is not); or the last of the maps that the model returns (timm's ``features_only``).
    """
    if tap.io == "output" and isinstance(value, Tensor) and value.ndim == 3 and images.prefix(tap.module) is not None:
        if any(value.shape[2] != each.shape[-1] for _, each in before):
            return []
        try:
            return [(images.with_layout(tap, value), value)]
        except LayoutError:
            return []
    if tap == Tap("") and isinstance(value, (list, tuple)) and value:
        maps = [isinstance(each, Tensor) and each.ndim == 4 and fits(each.shape[2:], images.canvas) for each in value]
        if all(maps):
            return [(Tap("", index=(len(value) - 1,)), value[-1])]
    return []


def _expand_collections(model: nn.Module, taps: list[Tap], example: Any, role: str) -> list[Tap]:
    """Replace each tap that holds a list or dict of maps by one tap for each of its maps, and find their layouts."""
    seen: dict[Tap, Any] = {}
    calls = dict.fromkeys(taps, 0)
    images = ImagePath(model, _canvas(example))

    def see(place: Tap, value: Any) -> None:
        images.see(place, value)
        for tap in calls:
            if (tap.module, tap.io) == (place.module, place.io):
                calls[tap] += not tap.index
                seen[tap] = value

    observe(model, example, see)  # a failure that matters comes again, and is told, in the real probe
    for tap, count in calls.items():
        if count > 1:
            raise TapError(
                f"The module of the tap {tap} runs {count} times in one forward pass (shared by several levels?), so "
                "it is not clear which of its maps is meant. Name a module that runs once."
            )
    expanded: list[Tap] = []
    for tap in taps:
        value = _entry(seen.get(tap), tap)
        maps = collection(value) or []
        for each, item in [(replace(tap, index=(*tap.index, key)), item) for key, item in maps] or [(tap, value)]:
            try:
                expanded.append(images.with_layout(each, item))
            except LayoutError as error:
                raise TapError(f"The {role}'s tap {each} cannot be used: it saw {describe(item)}; {error}.") from None
    return expanded


def _entry(value: Any, tap: Tap) -> Any:
    """What a tap's index leads to; None where there is no such entry, which the real probe tells."""
    try:
        for key in tap.index:
            value = value[key]
    except (KeyError, IndexError, TypeError):
        return None
    return value


PROBE_SIZE = 256  # pixels, square: divisible by every stride in use (up to P7 = 128)


def probe_input(model: nn.Module, size: int | Size | None = None) -> Tensor:
    """Zeros of shape (1, C, h, w) with the device, dtype and channels of the model's first convolution.

    Args:
        model: any detector or backbone.
        size: (h, w), or the side of a square, in pixels; None: the one size that the model takes, if it is such a
            model (see :func:`fixed_size`), else 256.
    """
    size = (size or fixed_size(model) or PROBE_SIZE) if not isinstance(size, tuple) else size
    height, width = (size, size) if isinstance(size, int) else size
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if convolution is not None:
        return convolution.weight.new_zeros(1, convolution.in_channels, height, width)
    parameter = next(model.parameters(), torch.empty(0))
    return parameter.new_zeros(1, 3, height, width)


def fixed_size(model: nn.Module) -> Size | None:
    """The (h, w) in pixels of the only images that a model of timm takes; None for a model that takes any."""
    for module in model.modules():
        if hasattr(module, "strict_img_size"):  # of a patch embedding
            size = getattr(module, "img_size", None)
            return (int(size[0]), int(size[1])) if module.strict_img_size and isinstance(size, tuple) else None
    for module in model.modules():
        settings = getattr(module, "pretrained_cfg", None)
        if isinstance(settings, Mapping) and settings.get("fixed_input_size"):
            return int(settings["input_size"][1]), int(settings["input_size"][2])
    return None


def observe(model: nn.Module, example: Any, see: Callable[[Tap, Any], None]) -> Exception | None:
    """Run the model and show each module's input and output to ``see``; the error that ended the pass, if any."""
    names = {module: name for name, module in model.named_modules()}

    def pre(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(Tap(names[module], "input"), first_argument(args, kwargs))

    def post(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        see(Tap(names[module]), output)

    handles = [module.register_forward_pre_hook(pre, with_kwargs=True) for module in names]
    handles += [module.register_forward_hook(post) for module in names]
    try:
        model(example)
    except Exception as error:  # a head that only runs in training may fail after its inputs were seen
        return error
    finally:
        for handle in handles:
            handle.remove()
    return None


class ImagePath:
    """Which modules an image batch goes into, and what layout the features behind them have.

    Args:
        model: the model that is probed.
        canvas: (h, w) in pixels of the images that it is probed with.
    """

    def __init__(self, model: nn.Module, canvas: Size) -> None:
        self.model = model
        self.canvas = canvas
        self.modules: list[str] = []

    def see(self, tap: Tap, value: Any) -> None:
        """Take note of a module whose input has the size of the canvas."""
        if tap.io == "input" and isinstance(value, Tensor) and value.ndim == 4 and value.shape[-2:] == self.canvas:
            self.modules.append(tap.module)

    def prefix(self, module: str) -> int | None:
        """What the innermost model around a module says about its tokens without a place (timm's do)."""
        for name in _around(module):
            number = getattr(self.model.get_submodule(name), "num_prefix_tokens", None)
            if isinstance(number, int):
                return number
        return None

    def source(self, module: str) -> str:
        """The module that the images go into on their way to another: the last one in the closest part around both.

        That is the patch embedding as a rule. It runs whatever method of the model is called (``forward_features``).
        """
        for part in _around(module):
            inside = [name for name in self.modules if not part or name == part or name.startswith(f"{part}.")]
            if inside:
                return inside[-1]
        return ""

    def with_layout(self, tap: Tap, value: Any) -> Tap:
        """The tap with the layout of what it saw.

        Raises:
            LayoutError: the layout cannot be told.
        """
        layout = tap.layout
        if layout is None:
            known = self.prefix(tap.module)
            try:
                layout = infer_layout(value, self.canvas, known)
            except LayoutError:
                if not known:
                    raise
                layout = infer_layout(value, self.canvas, 0)  # before the class token is put in front
        if layout is not None and layout.cell is not None:
            layout = replace(layout, images=self.source(tap.module))
        return replace(tap, layout=layout)


def _around(module: str) -> Iterator[str]:
    """A module's name, then those of the modules around it, the whole model (empty) last."""
    while module:
        yield module
        module = module.rpartition(".")[0]
    yield ""
