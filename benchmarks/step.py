"""One training step: the student alone, with the built-in distillation, with ours: ``python -m benchmarks.step``.

All arms run interleaved in one process, forward, backward and optimizer step, each on a student of its own:

- ``alone``: the student.
- ``built-in``: Ultralytics' ``distill_model=``.
- ``ours``: the callback's path with the default configuration, its own optimizer included, TensorBoard off.
- ``ours, no balance``: the same with ``balance.mode=fixed``; the difference is what measuring costs.
- ``floor``: the student's step and the teacher's forward pass up to its neck, without any distillation.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.common import interleave, save, show, summary
from benchmarks.models import retinanet, save_yolo, yolo, yolo_batch
from fgd_hooks import Distiller
from fgd_hooks.config import FGDConfig, load_config

PAIRS = [
    ("yolo26n", "yolo26s", 320, 4),
    ("yolo26n", "yolo26s", 192, 8),
    ("yolo26-half", "yolo26s", 192, 8),
    ("yolo11s", "yolo11m", 192, 4),
]
COLUMNS = ["arm", "median_ms", "quartiles_ms", "of_alone", "of_builtin", "of_floor"]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the trained parameters."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def finish(loss: Any, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Backward pass, clipping and step, as Ultralytics' trainer does them."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    optimizer.step()
    optimizer.zero_grad()


class Trainer(SimpleNamespace):
    """As much of Ultralytics' trainer as the callback looks at."""


class CallbackStep:
    """A training step with the hooks that the callback installs."""

    def __init__(
        self,
        student: nn.Module,
        teacher: Path,
        config: FGDConfig,
        batch: dict[str, Any],
        folder: Path,
        device: torch.device = torch.device("cpu"),  # noqa: B008
        host: Any = None,
    ) -> None:
        from fgd_hooks.integrations.ultralytics.session import TrainingSession
        from fgd_hooks.integrations.ultralytics.teacher import fuse_files, load_teachers

        self.student, self.batch = student, batch
        self.optimizer = adamw(student) if host is None else host.optimizer
        self.trainer = Trainer(
            model=student,
            args=SimpleNamespace(compile=False, seed=0, resume=None, imgsz=batch["img"].shape[-1]),
            batch_size=len(batch["img"]),
            world_size=1,
            ema=None,
            amp=device.type == "cuda",
            device=device,
            resume=False,
            optimizer=self.optimizer,
            scaler=SimpleNamespace(is_enabled=lambda: False) if host is None else host.scaler,
            wdir=folder,
            save_dir=folder,
        )
        teachers = fuse_files(load_teachers(teacher), teacher, config.teacher)
        self.run = TrainingSession(self.trainer, teachers, config)
        self.run.install()
        self.measured: list[bool] = []

    def __call__(self) -> None:
        """One step."""
        loss, _ = self.student(self.batch)
        finish(loss.sum(), self.optimizer, self.student)
        self.run.on_train_batch_end()
        distilled = self.run.distilled
        self.measured.append(distilled is not None and distilled.measured)


def yolo_arms(student: str, teacher: str, size: int, count: int, folder: Path) -> dict[str, Callable[[], None]]:
    """The five arms for a pair of Ultralytics models."""
    from ultralytics.nn.distill_model import DistillationModel

    from fgd_hooks.integrations.ultralytics.teacher import load_teacher

    batch = yolo_batch(size, count)
    args = {"imgsz": size}
    file = save_yolo(yolo(teacher, args=args), folder / f"{teacher}.pt")

    alone = yolo(student, args=args)
    alone_optimizer = adamw(alone)

    def step_alone() -> None:
        finish(alone(batch)[0].sum(), alone_optimizer, alone)

    wrapped = DistillationModel(load_teacher(file), yolo(student, args=args)).train()
    wrapped_optimizer = adamw(wrapped)

    def step_builtin() -> None:
        finish(wrapped(batch)[0].sum(), wrapped_optimizer, wrapped)

    config = load_config(None, ["log_interval=0"])
    fixed = load_config(config, ["balance.mode=fixed"])
    ours = CallbackStep(yolo(student, args=args), file, config, batch, folder)
    unbalanced = CallbackStep(yolo(student, args=args), file, fixed, batch, folder)

    beside = yolo(student, args=args)
    beside_optimizer = adamw(beside)
    frozen = CallbackStep(yolo(student, args=args), file, config, batch, folder).run.distiller._teachers[0]

    def step_floor() -> None:
        frozen.features(batch["img"])
        finish(beside(batch)[0].sum(), beside_optimizer, beside)

    return {
        "alone": step_alone,
        "built-in": step_builtin,
        "ours": ours,
        "ours, no balance": unbalanced,
        "floor": step_floor,
    }


class LoopStep:
    """A training step of a torchvision detector in a loop of one's own."""

    def __init__(self, student: nn.Module, teacher: nn.Module | None, size: int, count: int, config: FGDConfig) -> None:
        self.student, self.count, self.size = student.train(), count, size
        generator = torch.Generator().manual_seed(0)
        self.images = list(torch.rand(count, 3, size, size, generator=generator))
        corners = torch.rand(count, 10, 2, 2, generator=generator).sort(dim=2).values * (size - 8)
        corners[:, :, 1] += 8
        self.boxes = list(corners.flatten(2))
        self.targets = [{"boxes": each, "labels": torch.ones(10, dtype=torch.long)} for each in self.boxes]
        self.optimizer = adamw(student)
        self.measured: list[bool] = []
        self.distiller: Distiller | None = None
        if teacher is not None:
            example = [torch.zeros(3, size, size)]
            self.distiller = Distiller(student, teacher=teacher, config=config, example=example)
            self.optimizer.add_param_group({"params": self.distiller.parameters()})

    def __call__(self) -> None:
        """One step."""
        loss = sum(self.student(self.images, self.targets).values())
        if self.distiller is not None:
            distilled = self.distiller(self.images, self.boxes, canvas=(self.size, self.size))
            loss = loss + distilled.loss
            self.measured.append(distilled.measured)
        finish(loss, self.optimizer, self.student)


def retinanet_arms(size: int, count: int) -> dict[str, Callable[[], None]]:
    """The arms for torchvision, which has no distillation of its own."""
    teacher = retinanet("resnet50", size)
    fixed = load_config(None, ["balance.mode=fixed"])
    alone = LoopStep(retinanet("resnet18", size), None, size, count, FGDConfig())
    ours = LoopStep(retinanet("resnet18", size), teacher, size, count, FGDConfig())
    unbalanced = LoopStep(retinanet("resnet18", size), retinanet("resnet50", size), size, count, fixed)
    beside = LoopStep(retinanet("resnet18", size), None, size, count, FGDConfig())
    frozen = LoopStep(retinanet("resnet18", size), retinanet("resnet50", size), size, count, FGDConfig()).distiller

    def step_floor() -> None:
        if frozen is not None:
            frozen._teachers[0].features(beside.images)
        beside()

    return {"alone": alone, "ours": ours, "ours, no balance": unbalanced, "floor": step_floor}


def measure(labels: dict[str, Any], arms: dict[str, Callable[[], None]], rounds: int) -> list[dict[str, Any]]:
    """One row per arm, with its ratios to the others, each the median of the rounds' own ratios."""
    warmup = 9  # after the early measurements of the balance
    times = interleave(arms, rounds, warmup)
    ours = arms["ours"]
    measured: list[bool] = ours.measured[warmup:]  # type: ignore[attr-defined]
    plain = [time for time, flag in zip(times["ours"], measured, strict=True) if not flag]
    measuring = [time for time, flag in zip(times["ours"], measured, strict=True) if flag]
    rows = []
    for name in arms:
        row = {**labels, "arm": name, **summary(times[name])}
        for other, key in (("alone", "of_alone"), ("built-in", "of_builtin"), ("floor", "of_floor")):
            if other in times:
                ratios = [a / b for a, b in zip(times[name], times[other], strict=True)]
                row[key] = round(statistics.median(ratios), 3)
        rows.append(row)
    if plain and measuring:
        share = statistics.median(measuring) / statistics.median(plain)
        rows[list(arms).index("ours")]["measuring_step_of_plain_step"] = round(share, 3)
    return rows


def run(rounds: int, pairs: list[tuple[str, str, int, int]], torchvision: bool = True) -> list[dict[str, Any]]:
    """All rows."""
    rows = []
    for student, teacher, size, count in pairs:
        with tempfile.TemporaryDirectory() as folder:
            labels = {"student": student, "teacher": teacher, "size": size, "batch": count}
            rows += measure(labels, yolo_arms(student, teacher, size, count, Path(folder)), rounds)
        show(f"{student} <- {teacher}", rows[-5:], COLUMNS)
    if torchvision:
        size, count = 256, 2
        labels = {"student": "retinanet resnet18", "teacher": "retinanet resnet50", "size": size, "batch": count}
        rows += measure(labels, retinanet_arms(size, count), rounds)
        show("RetinaNet", rows[-4:], COLUMNS)
    return rows


def main() -> None:
    """Measure, print and write results/benchmarks/step.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="one small pair, few rounds, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.quick:
        run(4, [("yolo26n", "yolo26s", 128, 2)], torchvision=False)
        return
    print(save("step", run(options.rounds, PAIRS)))


if __name__ == "__main__":
    main()
