"""One Ultralytics training with distillation: what the callback installs and removes again."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgd_hooks.config import FGDConfig
from fgd_hooks.distilled import Distilled
from fgd_hooks.distiller import Distiller
from fgd_hooks.integrations.ultralytics.baseline import keep_columns
from fgd_hooks.integrations.ultralytics.boxes import boxes_of, mask_boxes_of
from fgd_hooks.integrations.ultralytics.checkpoint import DistillationCheckpoint
from fgd_hooks.integrations.ultralytics.compat import DistillingLoss, drop_loss, images_counted
from fgd_hooks.integrations.ultralytics.monitor import TrainingMonitor
from fgd_hooks.integrations.ultralytics.settings import record_settings
from fgd_hooks.integrations.ultralytics.teacher import fast_dtype, with_score_taps
from fgd_hooks.masks import PackedBoxes
from fgd_hooks.taps.hooks import LiveHook, scrub
from fgd_hooks.utils.checkpoint import LAST_CHECKPOINT
from fgd_hooks.utils.distributed import is_distributed
from fgd_hooks.utils.files import remove_leftovers
from fgd_hooks.utils.modules import unwrap

_SHORT = {"foreground": "fg", "background": "bg", "attention": "att", "global": "glob"}


class _Hook(LiveHook):
    """Calls a method of the session; a copy of it, in a copy of the model, does nothing."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method

    def __call__(self, *args: Any) -> Any:
        return self.method(*args)


class AfterStep:
    """Calls a method after each step of an optimizer.

    Not by torch's step hooks: an optimizer around another one (Lookahead) may never call them, or not have them.
    """

    def __init__(self, optimizer: Any, method: Callable[[Any], None]) -> None:
        self.optimizer = optimizer
        self.method: Callable[[Any], None] | None = method
        self.before = vars(optimizer).get("step")  # a scheduler puts its own there
        own = optimizer.step

        @functools.wraps(own)
        def step(*args: Any, **kwargs: Any) -> Any:
            result = own(*args, **kwargs)
            if self.method is not None:
                self.method(optimizer)
            return result

        self.step = step
        optimizer.step = step

    def remove(self) -> None:
        """Give the optimizer its own step back; one that somebody has wrapped meanwhile goes on without the method."""
        self.method = None
        if vars(self.optimizer).get("step") is not self.step:
            return
        if self.before is None:
            del self.optimizer.step
        else:
            self.optimizer.step = self.before


def named(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The loss's parts by the names that they have in the log."""
    return {f"fgd_{_SHORT.get(part, part)}": value for part, value in parts.items()}


class LossItems(dict[str, Any]):
    """The named items of a step's loss: the host's and ``fgd``, the sum of the parts, which are found by name as well.

    The progress bar has a column for each item, and no room for all parts.
    """

    parts: dict[str, Tensor]

    def __missing__(self, name: str) -> Tensor:
        return self.parts[name]


class TrainingSession:
    """One training: the distiller, its optimizer, and the hooks on model and optimizer.

    The methods ``on_...`` are called at Ultralytics' events of these names.
    """

    def __init__(self, trainer: Any, teachers: Sequence[nn.Module], config: FGDConfig) -> None:
        self.trainer = weakref.proxy(trainer)
        self.config = config
        self.model: nn.Module = unwrap(trainer.model)
        self.batch: dict[str, Any] | None = None
        self.distilled: Distilled | None = None
        self.task_loss: Tensor | None = None
        self.taught = False  # since the last step of the optimizer
        self.gradient_norm = 0.0
        self.batches = 0  # of this epoch
        self.shown: Any = 0  # (parts,) of the loss in the last step that did not rest
        self.sums: Any = 0  # of them over the batches
        self.ema_model = trainer.ema.ema if trainer.ema else None
        self.handles: list[Any] = []
        self.monitor: TrainingMonitor | None = None  # on the first rank
        self.compiled = bool(getattr(trainer.args, "compile", False))
        if config.teacher.dtype == "auto":
            config = copy.deepcopy(config)
            kind = trainer.device.type
            autocast = str(torch.get_autocast_dtype(kind)).removeprefix("torch.") if trainer.amp else None
            config.teacher.dtype = autocast or fast_dtype(trainer.device)
        with torch.random.fork_rng(devices=[]):  # modules are made on the CPU; no GPU's generator is touched
            torch.default_generator.manual_seed(trainer.args.seed)  # adapters start alike in every run, on every rank
            teachers = [teacher.to(trainer.device) for teacher in teachers]
            self.distiller = Distiller(self.model, teacher=teachers, config=with_score_taps(config, teachers))
        self.distiller.taps.enabled = self.compiled
        self.parallel: nn.Module = self.distiller
        self.parameters = list(self.distiller.parameters())  # none with identity adapters and a loss without weights
        self.optimizer: torch.optim.AdamW | None = None
        if self.parameters:
            self.optimizer = torch.optim.AdamW(
                self.parameters,
                lr=config.optimizer.lr,
                weight_decay=config.optimizer.weight_decay,
                fused=trainer.device.type in ("cpu", "cuda"),  # one call instead of a dozen for each of 50 tensors
            )
        self.checkpoint = DistillationCheckpoint(self.distiller, self.optimizer)

    def install(self) -> None:
        """Register the hooks, read the side file when resuming, open TensorBoard; all or nothing."""
        trainer, first = self.trainer, is_first_rank()
        try:
            if first:
                remove_leftovers(Path(trainer.wdir) / LAST_CHECKPOINT)
            if self.parameters and is_distributed():
                self.parallel = self._in_parallel()
            if trainer.resume:
                self.checkpoint.resume(Path(str(trainer.args.resume)).parent, trainer.start_epoch)
            self.handles = [AfterStep(trainer.optimizer, self.step)]
            if self.compiled:
                self.handles.append(DistillingLoss(self.model, self.add_loss_of))
            else:
                self.handles.append(self.model.register_forward_pre_hook(_Hook(self._batch_arrives)))
                self.handles.append(self.model.register_forward_hook(_Hook(self._add_loss)))
            if first:
                record_settings(self.config, Path(trainer.save_dir), resumed=bool(trainer.resume))
                self.monitor = TrainingMonitor(trainer, self.distiller, self.config, self.boxes_of)
                self.monitor.open()
        except BaseException:
            self.remove()
            raise

    def _in_parallel(self) -> nn.Module:
        """The distiller in a DDP of its own: it is outside the trainer's, and the ranks would drift apart."""
        # a part with the weight 0 leaves its context block without gradient
        unused = self.config.has_zero_weights
        new = torch.__version__ >= "2.13"  # the older name warns there, on each rank
        buffers: Any = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        return nn.parallel.DistributedDataParallel(self.distiller, find_unused_parameters=unused, **buffers)

    def remove(self) -> None:
        """Leave model, optimizer and teacher as they were found."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.distiller.detach()
        self.batch = self.distilled = self.task_loss = None
        if self.monitor is not None:
            self.monitor.close()
        self.monitor = None

    # the loss

    def _batch_arrives(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the model: remember a training batch and listen to the student's taps."""
        self.batch, batch = None, args[0] if args else None
        if isinstance(batch, dict) and self.model.training and torch.is_grad_enabled():
            self.batch = batch
            self.distiller.taps.enabled = True

    def _add_loss(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the model: append the distillation loss to the loss vector and to its named items."""
        batch, self.batch = self.batch, None
        self.distiller.taps.enabled = False
        return None if batch is None else self.add_loss_of(batch, output)

    def add_loss_of(self, batch: Any, output: Any) -> Any:
        """What the model gives for a training batch, its loss vector and named items, with the distillation's."""
        task, items = output
        images = batch["img"]
        count = images_counted(self.model, len(images))
        self.task_loss = task.detach().sum() / count  # per image, as the parts
        boxes = None if self.distiller.rests else self.boxes_of(batch)  # a step that rests has no use for them
        distilled: Distilled = self.parallel(images, boxes, task_loss=self.task_loss)
        self.taught = self.taught or (distilled.weight != 0 and not distilled.resting)
        # what is kept must not hold the graph: after out of memory the next forward pass needs its place
        loss = distilled.loss
        distilled = dataclasses.replace(distilled, loss=loss.detach())
        if self.monitor is not None and boxes is not None:
            self.monitor.see(distilled, boxes)
        if self.distilled is None or not distilled.resting:
            self.distilled = distilled  # a step that rests goes on showing the last one's parts
            self.shown = torch.stack(list(distilled.parts.values()))
        # a YOLO loss is the sum over the images of a batch, its items are per image
        extra = (loss * count).view(1).to(task.dtype)
        shown = LossItems(items)
        shown.parts = named(self.distilled.parts)
        shown["fgd"] = self.distilled.loss  # their sum
        self.batches, self.sums = self.batches + 1, self.sums + self.shown
        return torch.cat([task.view(-1), extra]), shown

    def boxes_of(self, batch: Mapping[str, Tensor]) -> PackedBoxes:
        """The pixel boxes of a batch, from its labels or its masks as the configuration says."""
        if self.config.boxes_from == "masks":
            return mask_boxes_of(batch, bool(self.trainer.args.overlap_mask))
        return boxes_of(batch)

    def step(self, optimizer: Any) -> None:
        """After a step of the student's optimizer: step ours.

        Not where nothing was distilled since the last step: momentum would still move the adapters. Not where the
        gradient is not finite, ours or, found by a loss scaler whose fused optimizer looks at that itself, the
        student's.
        """
        taught, self.taught = self.taught, False
        if self.optimizer is None:
            return
        overflow = getattr(optimizer, "found_inf", None)
        if not taught or (overflow is not None and bool(overflow)):
            self.gradient_norm = 0.0
            self.distiller.zero_grad()
            return
        scaler = self.trainer.scaler
        scale = scaler.get_scale() if scaler.is_enabled() else 1.0
        parameters = [p for p in self.parameters if p.grad is not None]
        if scale != 1.0:
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1.0 / scale)
        norm = float(nn.utils.clip_grad_norm_(parameters, self.config.optimizer.clip))
        self.gradient_norm = norm
        if norm < float("inf"):  # neither infinite nor NaN
            group = optimizer.param_groups[0]
            factor = group["lr"] / group["initial_lr"] if group.get("initial_lr") else 1.0
            for own in self.optimizer.param_groups:
                own["lr"] = self.config.optimizer.lr * factor
            self.optimizer.step()
        self.distiller.zero_grad()

    # the events

    def on_train_epoch_start(self) -> None:
        """Set the schedule's clock, and mend what an out-of-memory retry or a NaN recovery left behind."""
        trainer = self.trainer
        self.distiller.set_epoch(trainer.epoch, trainer.epochs)
        self.distiller.taps.clear()
        self.distiller.balance.forget()
        self.batch = self.task_loss = None
        self.batches = self.sums = 0
        if self.monitor is not None:
            self.monitor.seen = None
        self._drop_stale_gradients()
        ema = trainer.ema.ema if trainer.ema else None
        if ema is not None and ema is not self.ema_model:
            # NaN recovery made the EMA anew, as a copy of the hooked model, and went back to the last checkpoint
            scrub(ema)
            drop_loss(ema)
            self.ema_model = ema
            with contextlib.suppress(FileNotFoundError):
                self.checkpoint.load(Path(trainer.wdir))
            self.distiller.zero_grad()

    def on_train_batch_end(self) -> None:
        """Report the step."""
        self._drop_stale_gradients()
        if self.monitor is not None:
            self.monitor.end_batch(self.distilled, self.task_loss, self.gradient_norm)

    def on_train_epoch_end(self) -> None:
        """Take in a measurement that the epoch's last step began; all ranks come here, before one of them saves."""
        self.distiller.balance.close()
        trainer: Any = self.trainer
        if trainer.tloss is not None and self.distilled is not None and self.batches:
            # results.csv has the parts, for which the progress bar has no room
            means = zip(self.distilled.parts, self.sums / self.batches, strict=True)
            trainer.tloss = {**trainer.tloss, **named(dict(means))}
        if self.monitor is not None:
            keep_columns(self.trainer)
            self.monitor.end_training_epoch()

    def on_model_save(self) -> None:
        """Write the side file beside ``last.pt``; Ultralytics calls this on the first rank."""
        self.checkpoint.save(Path(self.trainer.wdir), int(self.trainer.epoch))

    def on_fit_epoch_end(self) -> None:
        """Report the validated epoch."""
        if self.monitor is not None:
            self.monitor.end_epoch()

    def on_train_end(self) -> None:
        """Report the run."""
        if self.monitor is not None:
            self.monitor.end_run()

    def _drop_stale_gradients(self) -> None:
        """Clear our gradients where the host has cleared its own without a step (a scaler's skip, out of memory)."""
        if any(p.grad is not None for p in self.parameters) and all(p.grad is None for p in self.model.parameters()):
            self.distiller.zero_grad()


def is_first_rank() -> bool:
    """Whether this process is the one that writes files."""
    return int(os.environ.get("RANK", -1)) <= 0
