"""The passes in which a model is probed: with an example, or with zeros of sizes and channels that it may take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fgd_hooks.errors import TapError
from fgd_hooks.taps.calls import call_model, resolved
from fgd_hooks.taps.canvas import Size
from fgd_hooks.taps.observation import Observation, observe
from fgd_hooks.taps.tap import Tap, describe

PROBE_SIZE = 256  # pixels: divisible by every stride in use (up to P7 = 128)
PROBE_CANVAS = (256, 384)  # not square, so that what covers it by chance is told from what does

MORE_SIZES = (512, 640)
"""Sides of square images that models of one size are made for, tried after what the model itself says."""


def probes(
    model: nn.Module,
    example: Any = None,
    role: str = "model",
    size: Size | None = None,
    taps: Sequence[Tap] | None = None,
) -> Iterator[tuple[Any, Observation]]:
    """Forward passes of a model that succeed, or at least reach all of ``taps``: with the example, or with zeros.

    Raises:
        TapError: none succeeds; the message says what was tried and what it raised.
    """
    given = example is not None
    attempts = [resolved(example)] if given else list(probe_inputs(model, size))
    failures: list[tuple[str, Exception]] = []
    done = 0
    for inputs, traced in [*((inputs, True) for inputs in attempts), (attempts[0], False)]:
        seen = observe(model, lambda each, given=inputs: call_model(each, given), inputs, traced=traced)  # type: ignore[misc]
        reached = taps is not None and {tap.module for tap in taps} <= {call.module for call in seen.calls}
        if seen.failure is None or reached:
            if seen.canvas == (0, 0):
                raise TapError(f"In what the {role} is called with are no images (..., H, W): {describe(inputs)}.")
            done += 1
            yield inputs, seen
        else:
            failures.append((describe(inputs), seen.failure))
        if done == 2 or (done and not traced):
            return
    if not done:
        raise _all_failed(model, role, failures, given) from failures[0][1]


def _all_failed(model: nn.Module, role: str, failures: list[tuple[str, Exception]], given: bool) -> TapError:
    raised: dict[str, list[str]] = {}
    for tried, error in failures[:-1]:  # the last is the first again
        text = " ".join(str(error).split())
        raised.setdefault(f"{type(error).__name__}: {text[:300]}", []).append(tried)
    tried = "; ".join(f"{', '.join(inputs)} raised {error}" for error, inputs in list(raised.items())[:4])
    advice = (
        "Pass an example that the model accepts: a tensor, a list, (args, kwargs) or a function of the model."
        if given
        else "Pass example=..., what the model is called with: a tensor, a list, (args, kwargs) or a function of the "
        "model."
    )
    return TapError(f"The probe of the {role} ({type(model).__name__}) failed. Called with {tried}. {advice}")


def probe_input(model: nn.Module, size: int | Size | None = None, channels: int | None = None) -> Tensor:
    """Zeros of shape (1, C, h, w) with the device and dtype of the model's first convolution.

    Args:
        model: any detector or backbone.
        size: (h, w), or the side of a square, in pixels; None: the one size that the model takes, if it is such a
            model (see :func:`fixed_size`), else 256.
        channels: C; None: as many as the first convolution takes.
    """
    size = (size or fixed_size(model) or PROBE_SIZE) if not isinstance(size, tuple) else size
    height, width = (size, size) if isinstance(size, int) else size
    convolution = _first_convolution(model)
    weight = next(model.parameters(), torch.empty(0)) if convolution is None else convolution.weight
    channels = channels or (3 if convolution is None else convolution.in_channels) or 3  # 0: not known yet (lazy)
    dtype = weight.dtype if weight.dtype.is_floating_point else None
    return torch.zeros(1, channels, height, width, device=weight.device, dtype=dtype)  # not the weight's own kind


def _first_convolution(model: nn.Module) -> nn.Conv2d | None:
    return next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)


def probe_inputs(model: nn.Module, size: Size | None = None) -> Iterator[Tensor]:
    """Zeros (1, C, h, w) that a model may take, the likeliest first.

    Sizes: ``size``, the only one that the model takes, 256 x 384, what its configuration says, and common squares.
    Channels: those of its configuration or first convolution, and 3: a convolution defined first need not be the one
    that the image goes into.
    """
    given = size or fixed_size(model)
    sizes = [*([given] if given else []), PROBE_CANVAS, *said_sizes(model)]
    sizes += [(side, side) for side in (PROBE_SIZE, *MORE_SIZES)]
    first = _first_convolution(model)
    channels = [*said_channels(model), *([first.in_channels] if first is not None else []), 3]
    for each in dict.fromkeys(sizes):
        for number in dict.fromkeys(number for number in channels if number):
            yield probe_input(model, each, number)


def _settings(model: nn.Module) -> Iterator[Any]:
    """The configurations that a model, and those inside it, have."""
    for module in model.modules():
        for name in ("config", "pretrained_cfg", "default_cfg", "image_processor"):
            settings = getattr(module, name, None)
            if settings is not None and not isinstance(settings, nn.Module):
                yield settings
                for inner in ("vision_config", "backbone_config"):
                    if getattr(settings, inner, None) is not None:
                        yield getattr(settings, inner)


def _said(settings: Any, *names: str) -> Any:
    for name in names:
        value = settings.get(name) if isinstance(settings, Mapping) else getattr(settings, name, None)
        if value is not None:
            return value
    return None


def said_sizes(model: nn.Module) -> list[Size]:
    """The (h, w) of images that a model's configurations or attributes name."""
    values = [_said(settings, "image_size", "input_size", "size", "resolution") for settings in _settings(model)]
    values += [getattr(module, "img_size", None) for module in model.modules()]
    return list(dict.fromkeys(size for value in values if (size := _as_size(value)) is not None))


def _as_size(value: Any) -> Size | None:
    if isinstance(value, Mapping):
        value = (value.get("height"), value.get("width"))
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value, value)
    if isinstance(value, (list, tuple)) and len(value) in (2, 3) and all(isinstance(each, int) for each in value):
        height, width = value[-2:]
        return (height, width) if min(height, width) >= 16 else None
    return None


def said_channels(model: nn.Module) -> list[int]:
    """The numbers of image channels that a model's own configurations name."""
    values = [_said(settings, "num_channels", "in_chans") for settings in _settings(model)]
    return [value for value in values if isinstance(value, int) and value > 0]


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
