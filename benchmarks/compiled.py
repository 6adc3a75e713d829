"""What compiling the student gives, alone and with distillation on: ``python -m benchmarks.compiled``.

A yolo26n student and a yolo26s teacher in the way that Ultralytics trains with ``compile=True``: the compiled model is
called with the images, the loss apart. Compiling takes minutes and a C++ compiler, so ``python -m benchmarks`` leaves
this one out unless asked (``--only compiled``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import interleave, save, show, summary
from benchmarks.models import yolo, yolo_batch
from benchmarks.step import adamw, finish
from fgd_hooks import Distiller
from fgd_hooks.integrations.ultralytics.boxes import boxes_of


def arm(size: int, count: int, compiled: bool, distilled: bool) -> Callable[[], None]:
    """A training step of a student of its own."""
    student, batch = yolo("yolo26n", args={"imgsz": size}), yolo_batch(size, count)
    called: Any = torch.compile(student) if compiled else student
    optimizer = adamw(student)
    distiller = None
    if distilled:
        distiller = Distiller(called, teacher=yolo("yolo26s"), config={"schedule": {"stop": None}})
        optimizer.add_param_group({"params": distiller.parameters()})

    def step() -> None:
        loss = student.loss(batch, called(batch["img"]))[0].sum()  # type: ignore[operator]
        if distiller is not None:
            loss = loss + distiller(batch["img"], boxes_of(batch)).loss * count
        finish(loss, optimizer, student)

    return step


def run(rounds: int, size: int, count: int) -> list[dict[str, Any]]:
    """One row per arm."""
    arms = {}
    seconds = {}
    for name, compiled, distilled in (
        ("distilled, compiled", True, True),
        ("distilled", False, True),
        ("alone, compiled", True, False),
        ("alone", False, False),
    ):
        arms[name] = arm(size, count, compiled, distilled)
        start = time.process_time()
        arms[name]()
        seconds[name] = round(time.process_time() - start, 1)
    times = interleave(arms, rounds)
    rows = []
    for name in arms:
        row: dict[str, Any] = {"arm": name, "size": size, "batch": count, **summary(times[name])}
        row["saved_ms"] = round(summary(times[name.partition(",")[0]])["median_ms"] - row["median_ms"], 1)
        row["first_step_s"] = seconds[name]
        rows.append(row)
    show("Compiled students", rows, ["arm", "median_ms", "quartiles_ms", "saved_ms", "first_step_s"])
    return rows


def main() -> None:
    """Measure, print and write results/benchmarks/compiled.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # both students are of one class: without a guard on hooks, code compiled for the one without taps serves the other
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch.manual_seed(0)
    print(save("compiled", run(options.rounds, 192, 4)))


if __name__ == "__main__":
    main()
