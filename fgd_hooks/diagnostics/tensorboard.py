"""TensorBoard: scalars of a distillation, one page that shows them together, and a row in its table of runs."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fgd_hooks.config import FGDConfig
    from fgd_hooks.diagnostics.attention import LevelSheet
    from fgd_hooks.distilled import Distilled
from fgd_hooks.distiller import Distiller

# tags of the run's row in TensorBoard's table of hyper-parameters
FINAL_MAP, FINAL_MAP50, BEST_MAP = "final/mAP50-95", "final/mAP50", "best/mAP50-95"
# of each epoch; TensorBoard's Custom Scalars draw no line for a tag with brackets, such as Ultralytics' own
EPOCH_MAP = "fgd/mAP50-95"

MEANINGS = {
    "fgd/loss": "The whole distillation loss as added to the task's.",
    "fgd/task_loss": "The task's own loss per image, also of a run with weight 0: lower is better.",
    "fgd/parts/": "A part of the distillation loss as added to the task's, summed over the levels.",
    "fgd/levels/": "A part of the distillation loss as added to the task's, of one level.",
    "fgd/raw/": "A part of one level before the loss's own weights, the balance and the schedule.",
    "fgd/balance/scale/": "What the balance multiplies a level's loss by.",
    "fgd/balance/ratio/": "|distillation gradient| / |task gradient| when last measured; balance.ratio is aimed at.",
    "fgd/balance/cosine/": "Cosine between the gradients of distillation and task: below 0 they pull apart.",
    "fgd/weight": "The configured weight times the schedule: 0 where nothing is distilled.",
    "fgd/skipped_steps": "Steps so far whose distillation loss was not finite and was left out.",
    "fgd/adapter_gradient_norm": "Norm of the gradient of adapters and context blocks in the last step.",
    "fgd/attention_distance/": "Distance of the student's attention from the teacher's on validation images; 0: alike.",
    EPOCH_MAP: "mAP50-95 on the validation images after each epoch, also of a run with weight 0: higher is better.",
    FINAL_MAP: "mAP50-95 on the validation images after the last epoch.",
    FINAL_MAP50: "mAP50 on the validation images after the last epoch.",
    BEST_MAP: "mAP50-95 on the validation images with the best checkpoint.",
    "train/": "A part of the host's training loss, mean of the epoch.",
    "val/": "A part of the host's loss on the validation images.",
    "metrics/": "The host's figure on the validation images.",
    "lr/": "Learning rate of a group of the host's optimizer.",
}
"""Beginning of a tag -> what its chart shows; TensorBoard has the line behind the (i) of each chart."""

_DESCRIBED: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def distillation_scalars(
    distiller: Distiller, distilled: Distilled, task_loss: float | None = None
) -> dict[str, float]:
    """Name to value of everything worth watching in one step: see :data:`MEANINGS`."""
    balance = distiller.balance
    tensors = {f"fgd/parts/{part}": value for part, value in distilled.parts.items()}
    for kind, levels in (("levels", distilled.levels), ("raw", distilled.raw)):
        tensors |= {f"fgd/{kind}/{name}/{part}": v for name, parts in levels.items() for part, v in parts.items()}
    for kind, values in (("scale", balance.scales), ("ratio", balance.ratios), ("cosine", balance.cosines)):
        tensors |= {f"fgd/balance/{kind}/{name}": v for name, v in zip(distiller.level_names, values, strict=True)}
    numbers = torch.stack([value.detach().float() for value in tensors.values()]).tolist()  # one wait for the device
    scalars = {name: value for name, value in zip(tensors, numbers, strict=True) if value == value}
    scalars["fgd/loss"] = sum(scalars.get(f"fgd/parts/{part}", 0.0) for part in distilled.parts)
    if task_loss is not None:
        scalars["fgd/task_loss"] = task_loss
    return {**scalars, "fgd/weight": distilled.weight, "fgd/skipped_steps": float(distiller.skipped_steps)}


def write_scalars(writer: Any, scalars: dict[str, float], step: int) -> None:
    """Write to a ``torch.utils.tensorboard.SummaryWriter``; a tag's first value carries the line of its chart."""
    from torch.utils.tensorboard.summary import scalar

    described = _DESCRIBED.setdefault(writer, set())
    for name, value in scalars.items():
        summary = scalar(name, value)
        if name not in described:
            described.add(name)
            meaning = next((line for beginning, line in MEANINGS.items() if name.startswith(beginning)), "")
            summary.value[0].metadata.summary_description = meaning
        writer.file_writer.add_summary(summary, step)


def write_sheets(writer: Any, sheets: Sequence[LevelSheet], step: int) -> None:
    """Draw sheets into TensorBoard's page "Images", as ``fgd/attention/<name>/<level>``, to a ``SummaryWriter``."""
    from fgd_hooks.diagnostics.plots import sheet_pixels

    for sheet in sheets:
        writer.add_image(f"fgd/attention/{sheet.name}/{sheet.level}", sheet_pixels(sheet), step, dataformats="HWC")


def scalar_layout(levels: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """The layout of TensorBoard's page "Custom Scalars": category -> chart -> ``["Multiline", tags]``.

    Args:
        levels: names of the distilled levels, :attr:`Distiller.level_names`.
    """

    def chart(*tags: str) -> list[Any]:
        return ["Multiline", list(tags)]  # regular expressions that match from a tag's beginning

    return {
        "Distillation": {
            "task against distillation": chart("fgd/task_loss$", "fgd/loss$"),
            "parts of the loss": chart("fgd/parts/"),
            "gradient ratio: distillation / task": chart("fgd/balance/ratio/"),
            "attention distance, student to teacher (validation)": chart("fgd/attention_distance/"),
            "mAP50-95 (validation)": chart(f"{EPOCH_MAP}$"),
            "weight and skipped steps": chart("fgd/weight$", "fgd/skipped_steps$"),
        },
        "Levels": {
            **{f"{level}: parts of the loss": chart(f"fgd/levels/{level}/") for level in levels},
            "scale of each level": chart("fgd/balance/scale/"),
            "cosine of the gradients: distillation, task": chart("fgd/balance/cosine/"),
        },
    }


def write_layout(writer: Any, levels: Sequence[str]) -> None:
    """Write :func:`scalar_layout` to a ``SummaryWriter``; once per run, at its start."""
    writer.add_custom_scalars(scalar_layout(levels))


def hyper_parameters(config: FGDConfig, **host: Any) -> dict[str, Any]:
    """The settings that runs are compared by, flat; TensorBoard's table of hyper-parameters has a column for each.

    Args:
        config: of the distillation.
        **host: the training loop's own: epochs, batch, ...
    """
    schedule = config.schedule
    return {
        "fgd.teacher": "+".join(Path(name or "unknown").name for name in config.teacher_names),
        "fgd.weight": config.weight,
        "fgd.interval": config.interval,
        "fgd.loss": "+".join(loss.name for loss in config.all_losses),
        "fgd.preset": "+".join(loss.preset for loss in config.all_losses),
        "fgd.adapter": config.adapter,
        "fgd.balance.mode": config.balance.mode,
        "fgd.balance.ratio": config.balance.ratio,
        "fgd.schedule": schedule.kind,
        # as text: a column must have the same type in all runs
        "fgd.schedule.stop": "never" if schedule.stop is None else str(schedule.stop),
        **host,
    }


def write_hyper_parameters(writer: Any, settings: Mapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
    """Write the run's row of TensorBoard's page "HParams" into the run's own event file; once, at its end.

    ``SummaryWriter.add_hparams`` would open a second run in a folder below, apart from the curves.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``.
        settings: name to number, text or bool, the same names in all runs that are to be compared.
        metrics: tag to value.
        step: at which the metrics are entered, the number of epochs for instance.
    """
    from torch.utils.tensorboard.summary import hparams

    for summary in hparams(dict(settings), dict(metrics)):
        writer.file_writer.add_summary(summary)
    write_scalars(writer, dict(metrics), step)
