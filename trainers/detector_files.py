"""The files of a detector trainer's run folder: checkpoints, the log, the settings."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detector_settings import Settings
from omegaconf import OmegaConf
from torch import nn

from fgd_hooks import Distiller
from fgd_hooks.errors import CheckpointError
from fgd_hooks.evaluation.coco_metrics import CocoMetrics
from fgd_hooks.evaluation.reporting import percent
from fgd_hooks.evaluation.runs import MAP, MAP50
from fgd_hooks.utils.checkpoint import LAST_CHECKPOINT, adamw_state, read_checkpoint, write_checkpoint

Row = dict[str, float]


def write_settings(settings: Settings, folder: Path) -> None:
    """``args.yaml``, without what is in ``fgd.yaml``."""
    folder.mkdir(parents=True, exist_ok=True)
    plain: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(settings))  # type: ignore[assignment]
    kept = {key: value for key, value in plain.items() if key not in ("teacher", "train", "fgd", "out")}
    (folder / "args.yaml").write_text(OmegaConf.to_yaml({**kept, "save_dir": plain["out"]}), encoding="utf-8")


def write_log(rows: Sequence[Row], folder: Path) -> None:
    """``results.csv``: a line for each epoch; nan where an epoch was not validated."""
    names = list(dict.fromkeys([*(name for row in rows for name in row), MAP, MAP50]))
    with (folder / "results.csv").open("w", encoding="utf-8", newline="") as stream:
        log = csv.DictWriter(stream, names, restval=math.nan)
        log.writeheader()
        log.writerows(rows)


def save_atomically(content: Any, file: Path) -> None:
    """Write with ``torch.save``; a reader finds the old file or the new one."""
    temporary = file.with_name(f".{file.name}.new")
    torch.save(content, temporary)
    os.replace(temporary, file)


def write_metrics(metrics: CocoMetrics, split: str, folder: Path) -> None:
    """``eval-SPLIT.json``, and one line on the screen."""
    text = json.dumps({"split": split, **metrics.to_dict()}, indent=1)
    (folder / f"eval-{split}.json").write_text(text, encoding="utf-8")
    print(f"{split}: mAP50-95 {percent(metrics.map50_95)}, mAP50 {percent(metrics.map50)}", flush=True)


def save_state(parts: Mapping[str, Any], rows: Sequence[Row], distiller: Distiller | None, folder: Path) -> None:
    """What resuming needs: ``last.pt``, which knows nothing of a teacher, and beside it a file with the distiller's.

    Args:
        parts: name to what has a ``state_dict``; those of the distiller begin with ``fgd.``.
        rows: the log so far.
        distiller: if there is one.
        folder: of the run.
    """
    states = {name: part.state_dict() for name, part in parts.items()}
    own = {name: states.pop(name) for name in parts if name.startswith("fgd.")}
    if distiller is not None:
        write_checkpoint(folder / LAST_CHECKPOINT, {**own, "distiller": distiller.training_state(), "epoch": len(rows)})
    save_atomically({**states, "rows": list(rows)}, folder / "last.pt")


def load_state(parts: Mapping[str, Any], distiller: Distiller | None, folder: Path) -> list[Row]:
    """Go on from what :func:`save_state` wrote; returns the log so far.

    Raises:
        FileNotFoundError: there is nothing to go on from.
        CheckpointError: it is another model's, another distiller's, or the two files are of different epochs.
    """
    file = folder / "last.pt"
    if not file.is_file():
        raise FileNotFoundError(f"There is no {file} to resume from; leave out resume to begin a training.")
    saved = torch.load(file, map_location="cpu", weights_only=True)
    rows: list[Row] = saved["rows"]
    if distiller is not None:
        side = read_checkpoint(folder / LAST_CHECKPOINT)
        if side["epoch"] != len(rows):
            found = f"{file} is of epoch {len(rows)}, {LAST_CHECKPOINT} beside it of epoch {side['epoch']}"
            raise CheckpointError(f"{found}; remove both to begin anew.")
        distiller.load_training_state(side["distiller"])
        saved |= side
    for name, part in parts.items():
        if name == "model":
            load_weights(part, file)
        elif name == "fgd.optimizer":  # its learning rate is the one of the step that comes next
            part.load_state_dict({**saved[name], "state": adamw_state(part, saved[name])["state"]})
        else:
            part.load_state_dict(saved[name])
    return rows


def save_weights(model: nn.Module, rows: Sequence[Row], folder: Path) -> None:
    """``model.pt``, and ``best.pt`` where the last row has the highest mAP so far: plain state_dicts."""
    save_atomically(model.state_dict(), folder / "model.pt")
    maps = [row[MAP] for row in rows if MAP in row]
    if MAP in rows[-1] and maps[-1] == max(maps):
        save_atomically(model.state_dict(), folder / "best.pt")


def load_weights(model: nn.Module, file: str | Path | None) -> None:
    """Weights from a state_dict or from a ``last.pt``; None: the model stays as it is.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: they are those of another model.
    """
    if file is None:
        return
    saved: Mapping[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    try:
        model.load_state_dict(saved.get("model", saved))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"The weights in {file} do not fit the {type(model).__name__}: {reason}") from error
