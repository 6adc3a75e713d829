"""An Ultralytics trainer that trains on two CPU processes, through Ultralytics' own multi-GPU launcher.

Ultralytics spawns processes for several GPUs only. Here its own launcher, pickling, samplers, DDP wrapper and
broadcasts are used as they are; what is replaced is the choice of the device and of the backend.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import LOCAL_RANK, RANK


class TwoRanksTrainer(DetectionTrainer):
    """Two processes with gloo."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.world_size = 2
        self.ddp = LOCAL_RANK == -1

    def _setup_ddp(self):
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", rank=RANK, world_size=2, timeout=timedelta(seconds=120))

    def _setup_train(self):
        stock = nn.parallel.DistributedDataParallel

        class OnCPU(stock):
            """device_ids are for GPUs."""

            def __init__(self, module, device_ids=None, **settings):
                super().__init__(module, **settings)

        nn.parallel.DistributedDataParallel = OnCPU
        try:
            super()._setup_train()
        finally:
            nn.parallel.DistributedDataParallel = stock

    def validate(self):
        """None: Ultralytics' validator asks the GPU for its number where there are several ranks."""
        return self.metrics or {}, float(self.epoch)

    def final_eval(self):
        """None, likewise."""


class Recorder:
    """A callback that writes what each rank sees to ``rank<N>.pt`` in a folder; picklable, so it travels along."""

    def __init__(self, folder: Path, distillation, fail_in_epoch: int | None = None) -> None:
        self.folder, self.distillation, self.fail_in_epoch = folder, distillation, fail_in_epoch
        self.losses: list[float] = []

    def attach(self, yolo) -> None:
        """Add it to a YOLO model, after the distillation's own callback."""
        yolo.add_callback("on_train_start", self.start)
        yolo.add_callback("on_train_batch_end", self.batch)
        yolo.add_callback("on_model_save", self.saved)
        yolo.add_callback("on_train_epoch_end", self.epoch)

    def start(self, trainer) -> None:
        """Write the state that this rank starts with."""
        self.write(trainer, f"start{max(RANK, 0)}.pt")

    def batch(self, trainer) -> None:
        """Keep the logged loss of each step."""
        if trainer.epoch == self.fail_in_epoch:
            raise RuntimeError("interrupted on purpose")
        self.losses.append(float(trainer.loss_items["fgd_fg"]))

    def saved(self, trainer) -> None:
        """Note the process that wrote the side file."""
        with open(self.folder / "saved.txt", "a") as file:
            print(RANK, trainer.epoch, (trainer.wdir / "last.fgd.safetensors").is_file(), file=file)

    def epoch(self, trainer) -> None:
        """Write the state of this rank."""
        self.write(trainer, f"rank{max(RANK, 0)}.pt")

    def write(self, trainer, name: str) -> None:
        """Write what must be equal on all ranks, and the losses that must not."""
        distiller = self.distillation.distiller(trainer)
        model = trainer.model.module if hasattr(trainer.model, "module") else trainer.model
        state = {
            "adapters": distiller.state_dict(),
            "scales": distiller.balance.scales,
            "step": distiller.clock.step,
            "student": dict(model.named_parameters()),
            "losses": self.losses,
            "world": int(os.environ.get("WORLD_SIZE", 1)),
            "accumulate": trainer.accumulate,
        }
        torch.save(state, self.folder / name)
