"""A training with ``weight=0``: nothing acts on it; what it shows lies in one chart with that of a distilled run."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch

from fgd_hooks.config import FGDConfig
from fgd_hooks.integrations.ultralytics.compat import images_counted
from fgd_hooks.integrations.ultralytics.monitor import RunMonitor
from fgd_hooks.integrations.ultralytics.settings import BEGUN_FILE, SETTINGS_FILE
from fgd_hooks.utils.checkpoint import LAST_CHECKPOINT
from fgd_hooks.utils.files import write_whole
from fgd_hooks.utils.modules import unwrap


class BaselineSession:
    """Watches one training, on its first rank, and only reads; the methods ``on_...`` are called at these events."""

    distiller = None

    def __init__(self, trainer: Any, config: FGDConfig) -> None:
        self.trainer = weakref.proxy(trainer)
        self.monitor = RunMonitor(self.trainer, config)
        self.steps = len(trainer.train_loader)
        self.position = 0  # in the epoch

    def install(self) -> None:
        """Open TensorBoard, and remove what an earlier, distilled run has left in the same folder."""
        if not self.trainer.resume:
            folder = Path(self.trainer.save_dir)
            for stale in (folder / SETTINGS_FILE, folder / BEGUN_FILE, Path(self.trainer.wdir) / LAST_CHECKPOINT):
                stale.unlink(missing_ok=True)
        self.monitor.open()

    def remove(self) -> None:
        """Close TensorBoard."""
        self.monitor.close()

    def on_train_epoch_start(self) -> None:
        """Count from the epoch's first batch."""
        self.position = 0

    def on_train_batch_end(self) -> None:
        """Write the task's loss per image, as a distilled run does."""
        trainer, position = self.trainer, self.position
        self.position += 1
        step = trainer.epoch * self.steps + position
        if not self.monitor.wants(step):
            return
        loader = trainer.train_loader
        images = min(loader.batch_size, max(1, len(loader.sampler) - position * loader.batch_size))
        count = images_counted(unwrap(trainer.model), images)
        self.monitor.write({"fgd/task_loss": float(trainer.loss.detach()) / max(1, trainer.world_size) / count}, step)

    def on_train_epoch_end(self) -> None:
        """Keep the columns of the log."""
        keep_columns(self.trainer)
        self.monitor.trained_epoch = self.trainer.epoch

    def on_model_save(self) -> None:
        """Nothing is saved."""

    def on_fit_epoch_end(self) -> None:
        """Report the validated epoch."""
        self.monitor.end_epoch()

    def on_train_end(self) -> None:
        """Report the run."""
        self.monitor.end_run()


def keep_columns(trainer: Any) -> None:
    """Let the log of a resumed training keep one width; parts of the loss that one half does not have are 0 there.

    Called before Ultralytics writes an epoch: it appends whatever losses there are, under the header of the first half.
    """
    if not (trainer.resume and trainer.csv.is_file()):
        return
    before = trainer.csv.read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split(",")] for line in before.splitlines() if line]
    columns = rows[0]
    zero = torch.zeros_like(next(iter(trainer.loss_items.values())))
    kept = []
    for prefix, losses in (("train/", trainer.tloss), ("val/", trainer.loss_items)):  # val/ has the bar's losses
        place = 1 + max((number for number, name in enumerate(columns) if name.startswith(prefix)), default=1)
        new = [name for name in (f"{prefix}{loss}" for loss in losses) if name not in columns]
        for row in rows:
            row[place:place] = new if row is columns else ["0"] * len(new)
        names = [name.removeprefix(prefix) for name in columns if name.startswith(prefix)]
        kept.append({name: losses.get(name, zero) for name in names})
    after = "".join(",".join(row) + "\n" for row in rows)
    if len(after.partition("\n")[0]) > len(before.partition("\n")[0]):
        write_whole(trainer.csv, after.encode())
    trainer.tloss, trainer.loss_items = kept
    if trainer.metrics:  # of an epoch that is not validated
        shown = [name for name in columns if name.startswith(("metrics/", "val/"))]
        trainer.metrics = {name: trainer.metrics.get(name, 0.0) for name in shown}
