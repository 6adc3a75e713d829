"""The probe: one forward pass over zeros in which a model is looked at, and which leaves no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fgd_hooks.layouts import Size
from fgd_hooks.tapnames import Tap
from fgd_hooks.taps import first_argument
from fgd_hooks.traces import RandomState

PROBE_SIZE = 256  # pixels, square: divisible by every stride in use (up to P7 = 128)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run a probe inside this block and leave no trace.

    Inside, every module is in eval mode and no gradient is recorded. Afterwards all modules have the attributes that
    they had before (training flags, cached anchors and the like), and so has the global random state.
    """
    modules = list(model.modules())
    saved = [dict(vars(module)) for module in modules]
    state = RandomState.now(model)
    try:
        with torch.no_grad():
            for module in modules:
                module.training = False
            yield
    finally:
        for module, attributes in zip(modules, saved, strict=True):
            vars(module).clear()
            vars(module).update(attributes)
        state.restore()


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
