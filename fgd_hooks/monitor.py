"""TensorBoard scalars of a distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fgd_hooks.distiller import Distilled, Distiller


def distillation_scalars(distiller: Distiller, distilled: Distilled) -> dict[str, float]:
    """Name to value of everything worth watching in one step.

    ==============================  ====================================================================
    ``fgd/parts/<part>``            part of the loss as added to the task's, summed over the levels
    ``fgd/levels/<level>/<part>``   the same of one level
    ``fgd/raw/<level>/<part>``      before the loss's own weights, the balance and the schedule
    ``fgd/balance/scale/<level>``   the balance's scale
    ``fgd/balance/ratio/<level>``   |distillation gradient| / |task gradient| at the last measurement
    ``fgd/weight``                  configured weight times schedule
    ``fgd/skipped_steps``           steps whose distillation loss was not finite
    ==============================  ====================================================================
    """
    tensors = {f"fgd/parts/{part}": value for part, value in distilled.parts.items()}
    for level in distilled.levels:
        tensors |= {f"fgd/levels/{level}/{part}": value for part, value in distilled.levels[level].items()}
        tensors |= {f"fgd/raw/{level}/{part}": value for part, value in distilled.raw[level].items()}
    for number, level in enumerate(distiller.level_names):
        tensors[f"fgd/balance/scale/{level}"] = distiller.balance.scales[number]
        tensors[f"fgd/balance/ratio/{level}"] = distiller.balance.ratios[number]
    values = torch.stack([value.detach().float() for value in tensors.values()]).tolist()  # one wait for the device
    scalars = {name: value for name, value in zip(tensors, values, strict=True) if value == value}
    return {**scalars, "fgd/weight": distilled.weight, "fgd/skipped_steps": float(distiller.skipped_steps)}


def write_scalars(writer: Any, scalars: dict[str, float], step: int) -> None:
    """Write to a ``torch.utils.tensorboard.SummaryWriter``."""
    for name, value in scalars.items():
        writer.add_scalar(name, value, step)
