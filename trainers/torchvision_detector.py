"""Train a torchvision detector on data of COCO format, alone or with a teacher (FGD).

    python trainers/torchvision_detector.py configs/SETTINGS.yaml data.root=coco epochs=12
    torchrun --standalone --nproc-per-node 8 trainers/torchvision_detector.py configs/SETTINGS.yaml

The keys are those of ``detector_settings.py``. The run's folder gets ``last.pt`` (to resume), ``model.pt`` and
``best.pt`` (stock state_dicts), ``last.fgd.safetensors`` (what the distillation adds), TensorBoard's events,
``results.csv`` and ``eval-*.json``, which ``fgd compare`` reads. ``train=teacher`` trains the teacher,
``train=alone`` without one.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import detector_files as files
import torch
from detector_data import Detections, as_lists, evaluate, read_splits
from detector_files import Row
from detector_processes import processes, start_processes
from detector_settings import ImageSettings, ModelSettings, Settings, load_settings
from rich.progress import track
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.tensorboard import SummaryWriter
from torchvision.models import get_model

from fgd_hooks import FGDConfig, load_config
from fgd_hooks.config import save_config
from fgd_hooks.diagnostics import tensorboard as monitor
from fgd_hooks.errors import ConfigError, FGDError
from fgd_hooks.evaluation.runs import MAP, MAP50
from fgd_hooks.initialization.initialize import images_to_fit, initialize
from fgd_hooks.initialization.report import InitializationReport
from fgd_hooks.integrations.torchvision import TorchvisionDistiller, detector_parts
from fgd_hooks.utils.preserve import RandomState

Build = Callable[[Any, int, ImageSettings], nn.Module]


def build_model(settings: ModelSettings, classes: int, image: ImageSettings) -> nn.Module:
    """A detector of torchvision for so many classes (background not counted)."""
    own = {} if settings.weights else {"num_classes": classes + 1}  # trained weights bring their own classes
    sizes = {} if settings.name.startswith("ssd") else {"min_size": tuple(image.min_size), "max_size": image.max_size}
    weights = {"weights": settings.weights, "weights_backbone": settings.weights_backbone}
    return get_model(settings.name, **weights, **own, **sizes, **settings.options)


class Training:
    """One training: model, optimisers and, with a teacher, the distiller; the loop over them."""

    def __init__(self, settings: Settings, build: Build) -> None:
        self.settings, self.out, self.rows = settings, Path(settings.out), list[Row]()
        self.rank, self.world, self.device = start_processes(settings)
        self.first = self.rank == 0  # the process that writes
        self.data = read_splits(settings.data)
        images = Detections(self.data["train"], settings.image)
        self.sampler = DistributedSampler(images, seed=settings.seed) if self.world > 1 else None
        self.loader = DataLoader(
            images, settings.batch, not self.sampler, self.sampler, num_workers=settings.workers, collate_fn=as_lists
        )
        torch.manual_seed(settings.seed)
        wanted = [each for each in (settings.model, settings.teacher) if each is not None]
        models = [build(each, len(self.data["train"].names), settings.image).to(self.device) for each in wanted]
        for model, each in zip(models, wanted, strict=True):
            files.load_weights(model, each.checkpoint)
        self.model = models[0]
        self.amp = getattr(torch, settings.amp) if settings.amp else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp is torch.float16)
        self.optimizers = [(settings.optimizer.build(self.model), settings.optimizer.clip)]
        self.writer = SummaryWriter(settings.out) if self.first else None
        self.distiller = self.add_teacher(models[1]) if settings.teacher is not None else None
        self.rates = [LambdaLR(each, self.factor) for each, _ in self.optimizers]
        if self.first:
            files.write_settings(settings, self.out)
        if settings.resume:
            self.rows = files.load_state(self.state(), self.distiller, self.out)
        ids = [self.device.index] if self.device.type == "cuda" else None
        self.parallel, self.distil = self.model, self.distiller
        if self.world > 1:
            self.parallel = DistributedDataParallel(self.model, device_ids=ids)
            if self.distiller and any(True for _ in self.distiller.parameters()):
                unused = self.distiller.config.has_zero_weights
                self.distil = DistributedDataParallel(self.distiller, find_unused_parameters=unused)

    def add_teacher(self, teacher: nn.Module) -> TorchvisionDistiller:
        """The distiller; its adapters and context blocks get an optimiser of their own."""
        name = self.settings.teacher.checkpoint or self.settings.teacher.name
        config = load_config(self.settings.fgd, {"teacher.name": name})
        if not self.settings.resume and (inherited := self.inherit(teacher, config)):
            print(inherited)
        distiller, own = TorchvisionDistiller(self.model, teacher=teacher, config=config), config.optimizer
        if parameters := list(distiller.parameters()):  # none with equal widths and a loss without weights
            adamw = torch.optim.AdamW(parameters, lr=own.lr, weight_decay=own.weight_decay)
            self.optimizers.append((adamw, own.clip))
        if self.first:
            print(distiller.describe())
            save_config(config, self.out / "fgd.yaml")
            monitor.write_layout(self.writer, distiller.level_names)
        return distiller

    def inherit(self, teacher: nn.Module, config: FGDConfig) -> InitializationReport | None:
        """Do what the setting ``inherit`` says; with weight 0 only what is asked for by name."""
        if config.weight == 0 and config.inherit == "auto":
            return None

        def images() -> list[Tensor]:
            data, sizes, state = self.loader.dataset, self.settings.image, RandomState.now()
            try:
                count = min(len(data), images_to_fit(self.settings.batch, max(sizes.min_size) * sizes.max_size))
                return [data[number * len(data) // count][0].to(self.device) for number in range(count)]
            finally:
                state.restore()

        parts, what = detector_parts(self.model), config.inherit or ""
        if missing := [part for part in what.split("+") if part in ("neck", "head") and part not in parts]:
            raise ConfigError(f"fgd.inherit is {what!r}, but the {type(self.model).__name__} has no {missing[0]}.")
        if what in ("neck", "head"):
            parts = {what: parts[what]}
        return initialize(self.model, teacher=teacher, what=what, parts=parts, images=images)

    def factor(self, step: int) -> float:
        """What the learning rates are multiplied by in a step."""
        return self.settings.optimizer.factor(step, len(self.loader), self.settings.epochs)

    def run(self) -> None:
        """Train, validate and write everything."""
        settings = self.settings
        for epoch in range(len(self.rows), settings.epochs):
            torch.manual_seed((settings.seed * 1000 + epoch) * self.world + self.rank)  # a resumed run is alike
            if self.sampler:
                self.sampler.set_epoch(epoch)
            if self.distiller:
                self.distiller.set_epoch(epoch, settings.epochs)
            row = {"epoch": epoch + 1, **self.train_epoch(epoch)}
            if epoch + 1 == settings.epochs or (epoch + 1) % settings.eval_every == 0:
                row |= self.measure("val")
            self.rows.append(row)
            if self.distiller:
                self.distiller.balance.close()
            if self.first:
                monitor.write_scalars(self.writer, row, epoch + 1)
                files.write_log(self.rows, self.out)
                files.save_weights(self.model, self.rows, self.out)
                files.save_state(self.state(), self.rows, self.distiller, self.out)
        if "test" in self.data:
            self.measure("test")
        if self.first and self.distiller:
            own = monitor.hyper_parameters(self.distiller.config, epochs=settings.epochs, batch=settings.batch)
            monitor.write_hyper_parameters(self.writer, own, {monitor.FINAL_MAP: self.rows[-1][MAP]}, settings.epochs)

    def train_epoch(self, epoch: int) -> Row:
        """One pass over the images; returns the means of the losses."""
        start, sums, steps = time.monotonic(), dict[str, Tensor](), len(self.loader)
        self.model.train()
        title = f"epoch {epoch + 1}/{self.settings.epochs}"
        bar = track(self.loader, title, total=steps, disable=not self.first)
        for number, (images, targets) in enumerate(bar, epoch * steps):
            for name, value in self.step(images, targets, number).items():
                sums[name] = sums.get(name, 0) + value
            for each in self.rates:
                each.step()
        means = {f"train/{name}": float(value) / steps for name, value in sums.items()}
        if not all(map(math.isfinite, means.values())):
            raise FloatingPointError(f"A loss is not finite in epoch {epoch + 1}: {means}. Lower optimizer.lr.")
        before = self.rows[-1]["time"] if self.rows else 0.0
        return {"time": before + time.monotonic() - start, **means, "lr": self.rates[0].get_last_lr()[0]}

    def step(self, images: list[Tensor], targets: list[dict[str, Tensor]], number: int) -> dict[str, Tensor]:
        """One step of all optimisers; returns the losses without gradient."""
        images = [image.to(self.device) for image in images]
        targets = [{key: value.to(self.device) for key, value in target.items()} for target in targets]
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            losses: dict[str, Tensor] = self.parallel(images, targets)
            task = torch.stack(list(losses.values())).sum()
            distilled = self.distil(task_loss=task.detach()) if self.distil else None
            total = task + distilled.loss if distilled else task
        self.scaler.scale(total).backward()
        for optimizer, clip in self.optimizers:
            learning = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if learning:  # nothing of the distiller learns once its schedule has ended
                self.scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(learning, clip or math.inf)
                self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        named = {name: value.detach() for name, value in losses.items()}
        if distilled:
            named |= {f"fgd_{part}": value for part, value in distilled.parts.items()}
        if self.first and number % self.settings.log_every == 0:
            monitor.write_scalars(self.writer, {f"train/{name}": float(value) for name, value in named.items()}, number)
            if distilled:
                scalars = monitor.distillation_scalars(self.distiller, distilled, task.item())
                monitor.write_scalars(self.writer, scalars, number)
        return named

    def measure(self, split: str) -> Row:
        """COCO metrics of a split; they are written as well."""
        share = {"rank": self.rank, "world": self.world}
        metrics = evaluate(self.model, self.data[split], self.device, self.settings.batch, **share)
        if self.first:
            files.write_metrics(metrics, split, self.out)
        return {MAP50: metrics.map50 or 0.0, MAP: metrics.map50_95 or 0.0}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, the distiller's part behind ``fgd``."""
        parts = {"model": self.model, "scaler": self.scaler}
        for prefix, (optimizer, _), each in zip(("", "fgd."), self.optimizers, self.rates, strict=False):
            parts |= {f"{prefix}optimizer": optimizer, f"{prefix}rate": each}
        return parts


def main(arguments: list[str], build: Build = build_model, schema: type[Settings] = Settings) -> None:
    """Train with the settings of a file and the ``key=value`` texts behind it."""
    with processes():
        Training(load_settings(schema, arguments[0], arguments[1:]), build).run()


def program(about: str | None, build: Build = build_model, schema: type[Settings] = Settings) -> None:
    """The command line; a user's mistake is one line, and exit code 2."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=about, formatter_class=raw)
    parser.add_argument("file", metavar="SETTINGS.yaml")
    parser.add_argument("settings", nargs="*", default=[], metavar="key=value", help="they win over those of the file")
    arguments = parser.parse_args()
    try:
        main([arguments.file, *arguments.settings], build, schema)
    except (FGDError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    program(__doc__)
