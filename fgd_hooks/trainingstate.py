"""What a resumed distillation needs, as plain tensors and numbers, and its restoring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fgd_hooks.lessons import signature
from fgd_hooks.savedstate import check_count, check_tensor

if TYPE_CHECKING:
    from fgd_hooks.distiller import Distiller


def _kind(distiller: Distiller) -> dict[str, Any]:
    """What must be equal for a saved state to fit."""
    return {
        "levels": [signature(pair) for pair in distiller.pairs],
        "loss": "+".join(loss.name for loss in distiller.config.all_losses),
        "adapter": distiller.config.adapter,
    }


def training_state(distiller: Distiller) -> dict[str, Any]:
    """See :meth:`fgd_hooks.Distiller.training_state`."""
    return {
        **_kind(distiller),
        "modules": {name: tensor.to("cpu", copy=True) for name, tensor in distiller.state_dict().items()},
        "balance": distiller.balance.state_dict(),
        "step": distiller.clock.step,
    }


def restore(distiller: Distiller, state: Mapping[str, Any]) -> None:
    """See :meth:`fgd_hooks.Distiller.load_training_state`."""
    if not isinstance(state, Mapping):
        raise ValueError(f"The saved state is a {type(state).__name__}; expected what training_state() gave.")
    for key, expected in _kind(distiller).items():
        found = state.get(key)
        texts = found if isinstance(found, list) else [found]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"The saved state is damaged: its {key} is missing or no text; remove the file.")
        if found != expected:
            raise ValueError(
                f"The saved state belongs to another distillation: its {key} is {str(found)[:500]!r}, here it is "
                f"{expected!r}. Use the student, teacher and configuration it was saved with, or remove the file."
            )
    modules, own, balance = state.get("modules"), distiller.state_dict(), state.get("balance")
    if not isinstance(modules, Mapping) or set(modules) != set(own) or not isinstance(balance, Mapping):
        raise ValueError("The saved state does not hold the tensors of these adapters and losses; remove the file.")
    trained = {name for name, _ in distiller.named_parameters()}
    for name, tensor in own.items():
        # statistics of a batch normalisation may hold NaN: while training they are not used
        check_tensor(name, modules[name], tensor, finite=name in trained)
    step = check_count("number of steps", state.get("step"))
    distiller.balance.load_state_dict(dict(balance))
    distiller.load_state_dict(dict(modules))
    distiller.clock.step = step
