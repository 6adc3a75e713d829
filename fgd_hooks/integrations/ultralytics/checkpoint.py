"""What the distillation adds to Ultralytics' checkpoints: a file of its own beside ``last.pt``."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from fgd_hooks.distiller import Distiller
from fgd_hooks.errors import CheckpointError
from fgd_hooks.utils.checkpoint import LAST_CHECKPOINT, adamw_state, check_count, read_checkpoint, write_checkpoint

logger = logging.getLogger("ultralytics")  # the host's own console and log file


class DistillationCheckpoint:
    """Saves and restores a distiller and the optimizer of its parameters.

    Args:
        distiller: of the training.
        optimizer: of the distiller's parameters; None where it has none.
    """

    def __init__(self, distiller: Distiller, optimizer: torch.optim.AdamW | None) -> None:
        self.distiller = distiller
        self.optimizer = optimizer
        self._write_failed = False

    def save(self, folder: Path, epoch: int) -> None:
        """Write the file; a full disk is said once, and the training goes on."""
        content = {
            "epoch": epoch,
            "distiller": self.distiller.training_state(),
            "optimizer": self.optimizer.state_dict() if self.optimizer else {},
        }
        try:
            write_checkpoint(folder / LAST_CHECKPOINT, content)
        except OSError as error:
            if not self._write_failed:
                message = "FGD: %s could not be written (%s); the training goes on, and each epoch tries again."
                logger.warning(message, LAST_CHECKPOINT, error)
            self._write_failed = True
            return
        if self._write_failed:
            logger.info("FGD: %s is written again.", LAST_CHECKPOINT)
        self._write_failed = False

    def load(self, folder: Path) -> int:
        """Restore what :meth:`save` wrote; returns its epoch."""
        path = folder / LAST_CHECKPOINT
        content = read_checkpoint(path)
        try:
            epoch = check_count("epoch", content.get("epoch"))
            own = adamw_state(self.optimizer, content.get("optimizer")) if self.optimizer else None
            self.distiller.load_training_state(content.get("distiller", {}))
        except ValueError as error:
            raise CheckpointError(f"{path} does not fit this training: {error}") from error
        if self.optimizer is not None and own is not None:
            self.optimizer.load_state_dict(own)
        return epoch

    def resume(self, folder: Path, start_epoch: int) -> None:
        """Go on from the file beside the checkpoint that Ultralytics resumes."""
        path = folder / LAST_CHECKPOINT
        try:
            epoch = self.load(folder)
        except FileNotFoundError:
            logger.warning("FGD: there is no %s; adapters and balance start anew.", path)
            return
        logger.info("FGD: adapters and balance go on from %s (epoch %d).", path, epoch + 1)
        if epoch != start_epoch - 1:
            logger.warning("FGD: %s is of epoch %d, the checkpoint of epoch %d.", path, epoch + 1, start_epoch)
