"""Where FGD's gradient comes from, inside a training: share of each part, and cosine with the task's gradient.

    python -m benchmarks.gradients yolo26n.yaml teacher.pt data.yaml --epochs 15 --out gradients.csv

In every step in which the balance measures, each part of the loss is differentiated by itself at the student's tapped
feature. One row per step and level: norm of the task's gradient, ratio of the whole distillation's gradient to it (with
the scale in use), share of each part (norm of its gradient / norm of the whole), cosine of whole and parts with the
task's gradient, and over which share of cells and channels the teacher's attention is spread (exp of its entropy).
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from ultralytics import YOLO

from fgd_hooks.integrations.ultralytics.callback import FGDCallback
from fgd_hooks.losses.attention import channel_attention, spatial_attention
from fgd_hooks.study.spec import SETTINGS


class Tracer:
    """Differentiates the parts of each level's loss in measuring steps.

    Args:
        callback: of the training; its loss must be FGD in plain operations.

    Attributes:
        rows: what was found.
    """

    def __init__(self, callback: FGDCallback) -> None:
        self.callback = callback
        self.rows: list[dict[str, Any]] = []
        self._features: list[Tensor] = []  # of the measuring step at work

    def start(self, trainer: Any) -> None:
        """Step between the Distiller and its losses; for ``on_train_start``."""
        distiller: Any = self.callback.distiller(trainer)
        inner, observe, next_step = distiller.level_loss, distiller.balance.observe, distiller.balance.next_step

        def begin() -> bool:
            self._features = []
            return bool(next_step())

        def see(features: list[Tensor], *arguments: Any) -> Any:
            self._features = features
            return observe(features, *arguments)

        def level(pair: Any, student: Tensor, teacher: Tensor, *arguments: Any) -> Any:
            result = inner(pair, student, teacher, *arguments)
            if self._features:
                number = distiller.level_names.index(pair.name)
                row = {"step": distiller.clock.step, "level": pair.name}
                factor = float(distiller.balance.scales[number]) * len(student)  # the loss is a sum over the images
                attention = _spreads(teacher, distiller.losses[pair.name].temperature)
                parts = {
                    part: factor * torch.autograd.grad(value, student, retain_graph=True)[0]
                    for part, value in result.parts.items()
                }
                self._features[number].register_hook(
                    lambda task: self.rows.append({**row, **_row(task, parts), **attention})
                )
            return result

        distiller.level_loss, distiller.balance.observe, distiller.balance.next_step = level, see, begin


def _row(task: Tensor, parts: dict[str, Tensor]) -> dict[str, float]:
    whole = torch.stack(list(parts.values())).sum(0)
    row = {"task": float(task.norm()), "ratio": float(whole.norm() / task.norm())}
    row |= {f"share_{part}": float(gradient.norm() / whole.norm()) for part, gradient in parts.items()}
    named = {"whole": whole, **parts}
    return row | {f"cosine_{part}": float(cosine_similarity(g.ravel(), task.ravel(), 0)) for part, g in named.items()}


def _spreads(feature: Tensor, temperature: float) -> dict[str, float]:
    """Over which share of the cells and channels the attention is spread: exp(entropy) / number, mean of the images."""
    maps = {
        "cells": spatial_attention(feature, temperature).flatten(1),
        "channels": channel_attention(feature, temperature),
    }
    shares = {}
    for name, attention in maps.items():
        weights = attention / attention.sum(1, keepdim=True)
        entropy = -(weights * weights.clamp_min(1e-30).log()).sum(1)
        shares[f"attention_{name}"] = float((entropy.exp() / weights.shape[1]).mean())
    return shares


def main() -> None:
    """Train, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("data")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--imgsz", type=int, default=192)
    parser.add_argument("--out", type=Path, default=Path("gradients.csv"))
    parser.add_argument("fgd", nargs="*", help="settings of the distillation, key=value")
    options = parser.parse_intermixed_args()
    model = YOLO(options.student, task="detect")
    callback = FGDCallback(options.teacher, config={"loss": {"options": {"fused": False}}}, overrides=options.fgd)
    tracer = Tracer(callback)
    model.add_callback("on_pretrain_routine_end", lambda trainer: torch.set_num_threads(1))
    callback.attach(model)
    model.add_callback("on_train_start", tracer.start)
    with tempfile.TemporaryDirectory() as folder:
        settings = {**SETTINGS, "imgsz": options.imgsz, "epochs": options.epochs, "seed": 0, "device": "cpu"}
        model.train(data=options.data, project=folder, name="run", **settings)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(tracer.rows[0]))
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, (str, int)) else f"{v:.5g}" for k, v in r.items()} for r in tracer.rows)


if __name__ == "__main__":
    main()
