"""Leave no trace: put models and the random state back after something was tried on them."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_CONTAINERS = (dict, OrderedDict, list, set)  # torch's tables of parameters, buffers, modules and hooks among them


@dataclass(frozen=True)
class RandomState:
    """The state of all random generators in use: Python's, NumPy's (where imported), torch's, those of GPUs."""

    python: Any
    numpy: Any
    cpu: Tensor
    cuda: dict[int, Tensor]

    @classmethod
    def now(cls, *models: nn.Module) -> RandomState:
        """The state at this moment, with that of the GPUs on which the models are."""
        numpy = sys.modules.get("numpy")
        devices = {p.device.index for model in models for p in model.parameters() if p.device.type == "cuda"}
        return cls(
            random.getstate(),
            numpy.random.get_state() if numpy else None,
            torch.get_rng_state(),
            {index: torch.cuda.get_rng_state(index) for index in devices},
        )

    def restore(self) -> None:
        """Set all generators back to this state."""
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)


@contextlib.contextmanager
def preserve(*models: nn.Module, probe: bool = False, but: Iterable[Tensor] = ()) -> Iterator[None]:
    """Run models inside this block; afterwards they and all random states are exactly as before.

    Put back are training modes, attributes (those added or removed inside, too), buffers and gradients; hooks of any
    kind that are registered inside are gone, and those removed inside are there again. A lazy module, which becomes
    what it is in its first pass, stays that.

    Args:
        models: may share modules.
        probe: inside, every module is in eval mode, and no gradient is recorded; parameters are taken to stay as they
            are. Without it, gradients begin at None, and a copy of all parameters is held meanwhile and put back.
        but: tensors that are changed on purpose, whose new values stay.
    """
    modules = list(dict.fromkeys(module for model in models for module in model.modules()))
    parameters = [p for p in dict.fromkeys(p for model in models for p in model.parameters()) if not is_lazy(p)]
    before = [(module, type(module), module.training, dict(vars(module)), _contents(module)) for module in modules]
    held = [each for module in modules for each in (*module.buffers(recurse=False), *vars(module).values())]
    values = {id(t): (t, t.detach().clone()) for t in held if isinstance(t, Tensor) and not is_lazy(t)}
    values.update({id(p): (p, p.detach().clone()) for p in parameters if not probe})
    for tensor in but:
        values.pop(id(tensor), None)
    gradients = [(p, p.grad, p.requires_grad) for p in parameters]
    state = RandomState.now(*models)
    for part in modules if probe else ():
        part.training = False
    for parameter in () if probe else parameters:
        parameter.grad = None
    try:
        with torch.no_grad() if probe else contextlib.nullcontext():
            yield
    finally:
        for module in modules:
            reshard: Any = getattr(module, "reshard", None)
            if callable(reshard):  # FSDP2 swaps parameters in a pass
                reshard()
        for module, kind, training, attributes, contents in before:
            if type(module) is kind:
                vars(module).clear()
                vars(module).update(attributes)
                for container, content in contents:
                    container.clear()
                    container.extend(content) if isinstance(container, list) else container.update(content)
            module.training = training
        for tensor, value in values.values():
            if (tensor.shape, tensor.dtype, tensor.device) != (value.shape, value.dtype, value.device):
                tensor.data = value
            elif not bit_equal(tensor, value):
                tensor.data.copy_(value)  # as if never written: a graph that waits for its backward stays valid
        for parameter, gradient, flag in gradients:
            parameter.grad = gradient
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        state.restore()


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """The containers among a module's attributes, each with a copy."""
    return [(each, copy.copy(each)) for each in vars(module).values() if type(each) in _CONTAINERS]


def bit_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers; NaN equals NaN."""
    if torch.equal(one, other):
        return True
    if one.shape != other.shape or not torch.equal(one.isnan(), other.isnan()):
        return False
    kept = {"posinf": float("inf"), "neginf": float("-inf")}
    return torch.equal(one.nan_to_num(**kept), other.nan_to_num(**kept))
