"""``compile=True`` in Ultralytics: how distillation joins a training whose student is compiled.

Ultralytics then calls the compiled model with the images and ``model.loss(batch, preds)`` on its own, outside of the
compiled part, so no hook on the model ever sees a batch. Instead ``loss`` of this one model object is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class DistillingLoss:
    """Stands in for the method ``loss(batch, preds)`` of one model and lets ``add`` extend what it returns.

    A copy of it, made by ``deepcopy`` or ``pickle`` of the model, is the model's own method again.

    Args:
        model: the student without its compile wrapper.
        add: called with a training batch and what the model's own ``loss`` returned; gives the result.
    """

    def __init__(self, model: nn.Module, add: Callable[[Any, Any], Any]) -> None:
        self.model = model
        self.add = add
        self.own: Callable[..., Any] = model.loss  # type: ignore[assignment]
        vars(model)["loss"] = self
        # Code that was compiled before, for a model of this class without taps, would be reused and pass the taps by.
        torch.compiler.reset()

    def __call__(self, batch: Any, preds: Any = None) -> Any:
        """The model's own loss vector and named items, extended while it trains."""
        output = self.own(batch, preds)
        if isinstance(batch, dict) and self.model.training and torch.is_grad_enabled():
            return self.add(batch, output)
        return output

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.model, "loss")

    def remove(self) -> None:
        """Give the model its own method back."""
        drop_loss(self.model)


def drop_loss(model: nn.Module) -> None:
    """Remove what replaces the method ``loss`` in a model, or in a copy of one."""
    vars(model).pop("loss", None)
