"""Time and memory of FGDLoss against the step-by-step implementation: ``python -m benchmarks.loss``.

Each round runs both on the same inputs, one after the other, so that a change in the machine's load meets both; the
table shows the best times and the median of the rounds' ratios. Peak memory is what a forward and backward pass needs
above its inputs, in units of one feature's bytes, measured in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT, machine
from benchmarks.reference_loss import ReferenceFGD
from fgd_hooks.losses.fgd import FGDLoss
from fgd_hooks.masks import PackedBoxes

CHANNELS = 256
SETS: dict[str, tuple[int, int, list[tuple[int, int]]]] = {
    # name: (images, pixels per cell of the first level, levels)
    "yolo640": (8, 8, [(80, 80), (40, 40), (20, 20)]),
    "yolo192": (8, 8, [(24, 24), (12, 12), (6, 6)]),
    "retina": (2, 8, [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]),
}
BOXES_PER_IMAGE = 10


def make_boxes(images: int, canvas: tuple[int, int], device: str) -> list[Tensor]:
    """Random boxes (n, 4) of 5 to 50 % of the side, for each image."""
    height, width = canvas
    size = torch.tensor([width, height], dtype=torch.float32)
    boxes = []
    for _ in range(images):
        extent = (0.05 + 0.45 * torch.rand(BOXES_PER_IMAGE, 2)) * size
        corner = torch.rand(BOXES_PER_IMAGE, 2) * (size - extent)
        boxes.append(torch.cat((corner, corner + extent), 1).to(device))
    return boxes


def make_loss(device: str) -> FGDLoss:
    """An FGDLoss whose last layers are not zero, so that every gradient has work to do."""
    loss = FGDLoss(CHANNELS)
    for block in (loss.student_context, loss.teacher_context):
        torch.nn.init.normal_(block.expand.weight, std=0.05)
    return loss.to(device)


def step(loss: Callable[[], Tensor], inputs: Sequence[Tensor], device: str) -> float:
    """Seconds of one forward and backward pass."""
    for tensor in inputs:
        tensor.grad = None
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_set(name: str, rounds: int, device: str) -> list[dict[str, Any]]:
    """One row per level of a set, and one for their sum with the boxes packed once."""
    images, stride, levels = SETS[name]
    canvas = (levels[0][0] * stride, levels[0][1] * stride)
    boxes = make_boxes(images, canvas, device)
    ours = make_loss(device)
    theirs = ReferenceFGD(ours).to(device)
    features = [torch.randn(2, images, CHANNELS, *level, device=device).unbind(0) for level in levels]
    features = [(s.clone().requires_grad_(), t) for s, t in features]
    trained = [*ours.parameters(), *theirs.parameters()]
    sums: list[tuple[float, float]] = []
    times: dict[tuple[int, int], list[tuple[float, float]]] = {level: [] for level in levels}
    for number in range(rounds + 2):
        total = [0.0, 0.0]
        start = time.perf_counter()
        packed = PackedBoxes.from_list(boxes, canvas)
        total[0] += time.perf_counter() - start
        for level, (student, teacher) in zip(levels, features, strict=True):
            inputs = [student, *trained]
            pair = (
                step(lambda s=student, t=teacher, b=packed: ours(s, t, b).loss, inputs, device),  # type: ignore[misc]
                step(lambda s=student, t=teacher: theirs(s, t, boxes, canvas), inputs, device),  # type: ignore[misc]
            )
            total = [a + b for a, b in zip(total, pair, strict=True)]
            if number >= 2:
                times[level].append(pair)
        if number >= 2:
            sums.append((total[0], total[1]))
    rows = [(f"{images}x{CHANNELS}x{h}x{w}", times[h, w]) for h, w in levels]
    return [summary(name, label, pairs) for label, pairs in [*rows, ("sum", sums)]]


def summary(name: str, label: str, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Best times in milliseconds and the median ratio."""
    return {
        "set": name,
        "level": label,
        "fgd_hooks_ms": round(1e3 * min(a for a, _ in pairs), 3),
        "reference_ms": round(1e3 * min(b for _, b in pairs), 3),
        "ratio": round(statistics.median(b / a for a, b in pairs), 2),
    }


def peak_memory(which: str, size: int, device: str) -> float:
    """Peak bytes of one pass above the inputs, as multiples of one feature; call it in a fresh process."""
    images, canvas = 8, (8 * size, 8 * size)
    boxes = make_boxes(images, canvas, device)
    ours = make_loss(device)
    loss: Any = ours if which == "fgd_hooks" else ReferenceFGD(ours).to(device)

    def run(student: Tensor, teacher: Tensor) -> None:
        result = loss(student, teacher, boxes, canvas)
        (result if isinstance(result, Tensor) else result.loss).backward()

    small = torch.randn(2, images, CHANNELS, 16, 16, device=device)
    run(small[0].requires_grad_(), small[1])
    student, teacher = torch.randn(2, images, CHANNELS, size, size, device=device).unbind(0)
    student = student.clone().requires_grad_()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(student, teacher)
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark afresh
        before = _resident("VmRSS")
        run(student, teacher)
        peak = _resident("VmHWM")
    return (peak - before) / (student.numel() * student.element_size())


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def copy_bandwidth(images: int, height: int, width: int, device: str) -> float:
    """Bytes per second, read and written, of a copy of one feature."""
    source = torch.randn(images, CHANNELS, height, width, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / best


def bandwidth_fraction(row: dict[str, Any], device: str) -> float:
    """The speed at which a level moves the least bytes there are to move, as a fraction of a copy's.

    Those are five features: both are read forward and backward, and the student's gradient is written.
    """
    images, channels, height, width = (int(number) for number in row["level"].split("x"))
    least = 5 * images * channels * height * width * 4
    reached = least / (1e-3 * row["fgd_hooks_ms"])
    return round(float(reached / copy_bandwidth(images, height, width, device)), 3)


def measure_memory(size: int, device: str) -> dict[str, float]:
    """Peak memory of both implementations, each in a process of its own."""
    peaks = {}
    for which in ("fgd_hooks", "reference"):
        command = [sys.executable, "-m", "benchmarks.loss", "--peak", which, "--size", str(size), "--device", device]
        printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        peaks[which] = round(float(printed), 3)
    return peaks


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sets", nargs="*", choices=sorted(SETS), default=list(SETS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=80, help="side of the map whose peak memory is measured")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--peak", choices=("fgd_hooks", "reference"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak_memory(options.peak, options.size, options.device))
        return
    rows = []
    print(f"{'set':9} {'level':>17} {'fgd_hooks ms':>13} {'reference ms':>13} {'ratio':>7} of copy bandwidth")
    for name in options.sets:
        for row in time_set(name, options.rounds, options.device):
            rows.append(row)
            if row["level"] != "sum":
                row["of_copy_bandwidth"] = bandwidth_fraction(row, options.device)
            print(
                "{set:9} {level:>17} {fgd_hooks_ms:13.3f} {reference_ms:13.3f} {ratio:7.2f}".format(**row),
                row.get("of_copy_bandwidth", ""),
                flush=True,
            )
    peaks = measure_memory(options.size, options.device)
    print(f"peak memory at 8x{CHANNELS}x{options.size}x{options.size}, in features:", peaks)
    if options.json:
        result = {
            "machine": machine(),
            "device": options.device,
            "rounds": options.rounds,
            "times": rows,
            "peak_features": peaks,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
