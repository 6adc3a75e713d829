"""What each option of the teacher saves, and what it changes: ``python -m benchmarks.teacher``.

A yolo26s teacher looks at one batch. Options are added one after the other; the features are compared with those of
the plain float32 pass, relative to their own size (root mean square of the difference over that of the feature,
largest level). Memory is the most that a pass holds at once, by PyTorch's allocator.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import interleave, peak_bytes, save, show, summary
from benchmarks.models import yolo, yolo_batch
from fgd_hooks.config import TeacherConfig
from fgd_hooks.taps.hooks import FeatureTaps
from fgd_hooks.taps.levels import find_levels
from fgd_hooks.teacher import FrozenTeacher

COLUMNS = ["option", "median_ms", "quartiles_ms", "of_plain", "memory_mib", "difference"]


def stopped(model: nn.Module, config: TeacherConfig) -> FrozenTeacher:
    """The teacher as a Distiller runs it."""
    return FrozenTeacher(model, [level.tap for level in find_levels(model, role="teacher")], config)


def arms(teacher: nn.Module, images: Tensor, compiled: bool) -> dict[str, Callable[[], list[Tensor]]]:
    """A pass for each option; every one returns the features."""
    whole = copy.deepcopy(teacher).eval()
    taps = FeatureTaps(whole, [level.tap for level in find_levels(whole)])

    def plain() -> list[Tensor]:
        with torch.no_grad():
            whole(images)
        return taps.pop()

    def inference() -> list[Tensor]:
        with torch.inference_mode():
            whole(images)
        return taps.pop()

    def fused() -> nn.Module:
        model: nn.Module = copy.deepcopy(teacher).eval().fuse(verbose=False)  # type: ignore[operator]
        return model

    def last() -> nn.Module:
        return fused().to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    float32, bfloat16 = TeacherConfig(dtype="float32"), TeacherConfig(dtype="bfloat16")
    teachers = {
        "stops after its last tap": stopped(copy.deepcopy(teacher), float32),
        "+ fuse": stopped(fused(), float32),
        "+ channels_last": stopped(last(), float32),
        "+ bfloat16": stopped(last(), bfloat16),
    }
    if compiled:
        teachers["fuse, channels_last, compile"] = stopped(last(), TeacherConfig(dtype="float32", compile=True))
        teachers["+ bfloat16, compile"] = stopped(last(), TeacherConfig(dtype="bfloat16", compile=True))
    found: dict[str, Callable[[], list[Tensor]]] = {"plain": plain, "plain, inference_mode": inference}
    for name, frozen in teachers.items():
        found[name] = lambda frozen=frozen: frozen.features(images)  # type: ignore[misc]
    return found


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Relative root mean square, the largest of the levels."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.float() - b).square().mean().sqrt() / b.square().mean().sqrt()) for a, b in pairs)


def run(rounds: int, size: int, count: int, compiled: bool) -> list[dict[str, Any]]:
    """One row per option."""
    images = yolo_batch(size, count)["img"]
    every = arms(yolo("yolo26s"), images, compiled)
    expected = [feature.clone() for feature in every["plain"]()]
    changes = {name: difference(arm(), expected) for name, arm in every.items()}
    times = interleave(every, rounds)
    rows: list[dict[str, Any]] = []
    for name, arm in every.items():
        row: dict[str, Any] = {"option": name, "size": size, "batch": count, **summary(times[name])}
        row["of_plain"] = round(row["median_ms"] / summary(times["plain"])["median_ms"], 3)
        row["memory_mib"] = round(peak_bytes(arm) / 2**20, 1)
        row["difference"] = f"{changes[name]:.1e}"
        rows.append(row)
    show(f"yolo26s as a teacher, {size} px, batch {count}", rows, COLUMNS)
    return rows


def main() -> None:
    """Measure, print and write results/benchmarks/teacher.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave out what needs a C++ compiler and minutes")
    parser.add_argument("--quick", action="store_true", help="small and without compile, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.quick:
        run(3, 128, 2, compiled=False)
        return
    print(save("teacher", run(options.rounds, 320, 4, not options.no_compile)))


if __name__ == "__main__":
    main()
