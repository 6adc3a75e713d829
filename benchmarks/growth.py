"""How the cost of the loss grows with boxes, area, batch, levels and channels: ``python -m benchmarks.growth``.

Masks, loss, forward and backward of all levels together, from a base of 8 images, 128 channels, 10 boxes per image and
three levels of 40, 20 and 10 cells squared; one quantity is changed at a time. Also the peak memory of the masks of an
80 x 80 level, by PyTorch's allocator.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT, interleave, peak_bytes, save, show, summary
from fgd_hooks.losses.fgd import FGDLoss
from fgd_hooks.masks import PackedBoxes, box_masks

BASE = {"boxes": 10, "side": 40, "batch": 8, "levels": 3, "channels": 128}
VALUES = {
    "boxes": [1, 10, 100, 1000],
    "side": [20, 40, 80],
    "batch": [2, 4, 8, 16],
    "levels": [1, 2, 3, 4],
    "channels": [32, 64, 128, 256],
}
PICTURE = ROOT / "docs" / "pictures" / "growth.png"


def boxes_of(images: int, count: int, side: float) -> PackedBoxes:
    """Random boxes of 5 to 50 % of the canvas of side x side pixels."""
    generator = torch.Generator().manual_seed(0)
    extent = (0.05 + 0.45 * torch.rand(images * count, 2, generator=generator)) * side
    corner = torch.rand(images * count, 2, generator=generator) * (side - extent)
    owner = torch.arange(images).repeat_interleave(count)
    return PackedBoxes.from_flat(torch.cat((corner, corner + extent), 1), owner, images, (side, side))


def pass_of(setting: dict[str, int]) -> Callable[[], None]:
    """A forward and backward pass of all levels for a setting."""
    generator = torch.Generator().manual_seed(0)
    sides = [max(1, setting["side"] >> level) for level in range(setting["levels"])]
    packed = boxes_of(setting["batch"], setting["boxes"], setting["side"] * 8)
    losses = [FGDLoss(setting["channels"]) for _ in sides]
    features: list[tuple[Tensor, Tensor]] = []
    for side in sides:
        pair = torch.randn(2, setting["batch"], setting["channels"], side, side, generator=generator).unbind(0)
        features.append((pair[0].clone().requires_grad_(), pair[1]))

    def run() -> None:
        total = sum(loss(s, t, packed).loss for loss, (s, t) in zip(losses, features, strict=True))
        total.backward()  # type: ignore[union-attr]
        for student, _ in features:
            student.grad = None

    return run


def mask_memory(count: int) -> float:
    """Peak MiB that the masks of 8 images with ``count`` boxes each take, the masks themselves included."""
    packed = boxes_of(8, count, 640)
    return round(peak_bytes(lambda: box_masks(packed, 80, 80)) / 2**20, 2)


def run(rounds: int, values: dict[str, list[int]]) -> list[dict[str, Any]]:
    """One row per setting."""
    rows: list[dict[str, Any]] = []
    for quantity, settings in values.items():
        times = interleave({str(each): pass_of({**BASE, quantity: each}) for each in settings}, rounds)
        of_quantity = [{"quantity": quantity, "value": each, **summary(times[str(each)])} for each in settings]
        for row in of_quantity:
            if quantity == "boxes":
                row["mask_memory_mib"] = mask_memory(int(row["value"]))
        show(f"Growth with {quantity}", of_quantity, ["value", "median_ms", "quartiles_ms", "mask_memory_mib"])
        rows += of_quantity
    return rows


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """One panel per quantity on double logarithmic axes, with a line of slope 1."""
    from matplotlib.figure import Figure

    quantities = list(dict.fromkeys(row["quantity"] for row in rows))
    titles = {"boxes": "boxes per image", "side": "cells of the first level", "levels": "number of levels"}
    figure = Figure(figsize=(3 * len(quantities), 3), layout="constrained")
    axes = figure.subplots(1, len(quantities), sharey=True, squeeze=False)[0]
    for axis, quantity in zip(axes, quantities, strict=True):
        mine = [row for row in rows if row["quantity"] == quantity]
        values = [row["value"] ** 2 if quantity == "side" else row["value"] for row in mine]
        medians = [row["median_ms"] for row in mine]
        axis.loglog(values, medians, "o-", label="measured", color="tab:blue")
        last = [medians[-1] * value / values[-1] for value in values]
        axis.loglog(values, last, "--", label="proportional", color="0.6")
        axis.set_title(titles.get(quantity, quantity), fontsize=10)
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
        every = [row["median_ms"] for row in rows]
        axis.set_ylim(0.5 * min(every), 1.5 * max(every))
        axis.set_yticks([10, 20, 50, 100], ["10", "20", "50", "100"])
        axis.grid(True, which="major", alpha=0.3)
    axes[0].set_ylabel("forward and backward, ms")
    axes[0].legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def main() -> None:
    """Measure, print, draw and write results/benchmarks/growth.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="ends of each range, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        run(3, {"boxes": [1, 100], "channels": [32, 64]})
        return
    rows = run(options.rounds, VALUES)
    draw(rows, PICTURE)
    print(save("growth", rows, base=BASE))


if __name__ == "__main__":
    main()
