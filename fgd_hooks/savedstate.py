"""Checks of a saved state, all of them before the first value is loaded, so that none is ever loaded by half."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MAX_COUNT = 1 << 53  # of steps and epochs; far beyond any training


def check_count(name: str, found: Any) -> int:
    """A number of steps or epochs, from 0.

    Raises:
        ValueError: it is none.
    """
    if type(found) is not int:
        raise ValueError(f"The saved {name} is missing or damaged: found a {type(found).__name__}, expected a count.")
    if not 0 <= found < MAX_COUNT:
        raise ValueError(f"The saved {name} is negative or above {MAX_COUNT}.")
    return found


def check_tensor(name: str, found: Any, like: Tensor, *, finite: bool = False, low: float | None = None) -> Tensor:
    """A tensor of the shape and dtype of ``like``.

    Args:
        name: what it is, for the message.
        found: the saved value.
        like: the tensor that it will be copied to.
        finite: refuse NaN and infinity.
        low: refuse values below it.

    Raises:
        ValueError: it does not fit.
    """
    if not isinstance(found, Tensor) or found.layout != torch.strided or found.is_meta:
        raise ValueError(f"The saved {name} is missing or no plain tensor.")
    if found.shape != like.shape or found.dtype != like.dtype:
        raise ValueError(
            f"The saved {name} is {found.dtype} of shape {tuple(found.shape)}; expected {like.dtype} of shape "
            f"{tuple(like.shape)}."
        )
    if finite and not bool(torch.isfinite(found).all()):
        raise ValueError(f"The saved {name} holds NaN or infinite values.")
    if low is not None and bool((found < low).any()):
        raise ValueError(f"The saved {name} holds values below {low:g}.")
    return found


def adamw_state(optimizer: torch.optim.AdamW, saved: Any) -> dict[str, Any]:
    """What ``optimizer.load_state_dict`` takes: the saved moments and step counts with the optimizer's own settings.

    The settings (learning rate, weight decay, ...) are the configuration's, never the file's.

    Raises:
        ValueError: the saved state does not fit the optimizer's parameters.
    """
    state = saved.get("state") if isinstance(saved, Mapping) else None
    if not isinstance(state, Mapping):
        raise ValueError("The saved optimizer is missing or damaged.")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    checked: dict[int, dict[str, Tensor]] = {}
    for number, entry in state.items():
        if type(number) is not int or not 0 <= number < len(parameters):
            raise ValueError(f"The saved optimizer is of other parameters than these {len(parameters)}.")
        if not isinstance(entry, Mapping):
            raise ValueError("The saved optimizer is missing or damaged.")
        name, parameter = f"optimizer state of parameter {number}", parameters[number].detach()
        scalar = torch.zeros((), dtype=torch.float32)
        checked[number] = {
            "step": check_tensor(f"{name} (step)", entry.get("step"), scalar, finite=True, low=0),
            "exp_avg": check_tensor(f"{name} (exp_avg)", entry.get("exp_avg"), parameter, finite=True),
            "exp_avg_sq": check_tensor(f"{name} (exp_avg_sq)", entry.get("exp_avg_sq"), parameter, finite=True, low=0),
        }
    return {"state": checked, "param_groups": optimizer.state_dict()["param_groups"]}
