"""Leave no trace: put models and the random state back after something was tried on them."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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
def no_trace(*models: nn.Module) -> Iterator[None]:
    """Run forward and backward passes inside this block and leave no trace in the models and the random state.

    Afterwards parameters, buffers, gradients, training modes and plain attributes are as before. Inside, gradients
    begin at None. Hooks that are registered inside stay. A copy of all weights is held meanwhile.
    """
    modules = list({id(m): m for model in models for m in model.modules()}.values())
    attributes = [(module, dict(vars(module)), dict(module._buffers)) for module in modules]
    parameters = list({id(p): p for model in models for p in model.parameters()}.values())
    tensors = [*parameters, *{id(b): b for model in models for b in model.buffers()}.values()]
    values = [(tensor, tensor.detach().clone()) for tensor in tensors]
    gradients = [(parameter, parameter.grad) for parameter in parameters]
    state = RandomState.now(*models)
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        state.restore()
        for module, own, buffers in attributes:
            vars(module).clear()
            vars(module).update(own)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for tensor, value in values:
                if not bit_equal(tensor, value):
                    tensor.data.copy_(value)  # as if never written: a graph that waits for its backward stays valid
        for parameter, gradient in gradients:
            parameter.grad = gradient


def bit_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers; NaN equals NaN."""
    if torch.equal(one, other):
        return True
    if one.shape != other.shape or not torch.equal(one.isnan(), other.isnan()):
        return False
    kept = {"posinf": float("inf"), "neginf": float("-inf")}
    return torch.equal(one.nan_to_num(**kept), other.nan_to_num(**kept))


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
