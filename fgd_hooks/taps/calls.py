"""How a model is called: the forms that ``example=`` and ``teacher_inputs=`` may have."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model with inputs in any of these forms.

    =====================  =======================================================================================
    tensor, list, object   ``model(inputs)``
    tuple                  ``model(*inputs)``
    mapping                ``model(**inputs)`` where the model takes arguments of these names, else ``model(inputs)``
    ``(args, kwargs)``     ``model(*args, **kwargs)``: a tuple or list, and a dict
    function               ``inputs(model)``, or, of a function without arguments, what it returns in one of these forms
    =====================  =======================================================================================
    """
    if is_function(inputs):
        return inputs(model)
    args, kwargs = arguments(model, inputs)
    return model(*args, **kwargs)


def resolved(inputs: Any) -> Any:
    """The inputs; of a function without arguments, what it returns."""
    if is_function(inputs) and not _parameters(inputs):
        return inputs()
    return inputs


def is_function(inputs: Any) -> bool:
    """Whether inputs are given as a function, which runs the model or makes the inputs."""
    return callable(inputs) and not isinstance(inputs, (Tensor, nn.Module, Mapping, list, tuple))


def arguments(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with, as positional and keyword arguments; see :func:`call_model`."""
    if type(inputs) is tuple:
        if len(inputs) == 2 and isinstance(inputs[0], (tuple, list)) and isinstance(inputs[1], Mapping):
            args, kwargs = inputs
            if not kwargs or _takes(model, args, kwargs):
                return tuple(args), dict(kwargs)
        return (inputs if _takes(model, inputs, {}) else (inputs,)), {}
    if isinstance(inputs, Mapping) and all(isinstance(key, str) for key in inputs) and _takes(model, (), inputs):
        return (), dict(inputs)
    return (inputs,), {}


def _takes(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> bool:
    parameters = _parameters(model.forward)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if named and kwargs and not named & kwargs.keys():
        return False  # forward(batch, **kwargs) takes a batch, not its entries
    try:
        inspect.Signature(parameters).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)]


IMAGES = ("pixel_values", "images", "image", "imgs", "img", "inputs", "x")
"""Keys of a batch under which its images are looked for first."""


def images_in(inputs: Any) -> Tensor | None:
    """The first images (..., H, W) in what a model is called with; None where there are none to be seen."""
    if isinstance(inputs, Tensor):
        return inputs if inputs.ndim >= 3 and inputs.is_floating_point() else None
    if isinstance(inputs, Mapping):
        values: list[Any] = [inputs[key] for key in IMAGES if key in inputs] + list(inputs.values())
    elif isinstance(inputs, (list, tuple)):
        values = list(inputs)
    else:
        values = [getattr(inputs, "tensors", None)]  # a batch padded to one size, as DETR's code has it
    return next((found for value in values if (found := images_in(value)) is not None), None)


def batch_in(inputs: Any) -> Any:
    """The batch (N, C, H, W) in what a model is called with; the inputs themselves where there is none (a list)."""
    found = None if isinstance(inputs, list) else images_in(inputs)
    return found if found is not None and found.ndim == 4 else inputs


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    """The inputs with their floating-point tensors in another dtype; functions and unknown objects as they are."""
    if isinstance(inputs, Tensor):
        return inputs.to(dtype) if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping) and type(inputs) is dict:
        return {key: cast(value, dtype) for key, value in inputs.items()}
    if type(inputs) in (list, tuple):
        return type(inputs)(cast(value, dtype) for value in inputs)
    if isinstance(inputs, Mapping) or isinstance(getattr(inputs, "tensors", None), Tensor):
        changed = copy.copy(inputs)
        if isinstance(inputs, Mapping):
            for key, value in inputs.items():
                changed[key] = cast(value, dtype)  # type: ignore[index]
        else:
            changed.tensors = cast(inputs.tensors, dtype)
        return changed
    return inputs
