"""The picture of one comparison: every run as a point, and the gains with their intervals."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import IO

from fgd_hooks.evaluation.arms import Comparison
from fgd_hooks.evaluation.reporting import COLOURS

_BASE, _POINT = "#555555", COLOURS[0]


def picture(group: Comparison, split: str) -> str:
    """File name of a comparison's picture on one split."""
    return f"{group.data}-{group.student}-{split}.png"


def draw_group(group: Comparison, split: str, file: Path | IO[bytes]) -> None:
    """Draw a group's arms on one split as a PNG: left a point per seed and the mean, right the paired differences."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = [arm for arm in group.arms if group.values(arm, split)]
    figure = Figure(figsize=(9.0, 1.6 + 0.36 * len(arms)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(arms) - 1, -1, -1)  # the first arm on top
    for place, arm in zip(places, arms, strict=True):
        values = list(group.values(arm, split).values())
        colour = _BASE if arm is group.baseline else _POINT
        left.plot(values, [place] * len(values), "o", color=colour, alpha=0.55, markersize=5, markeredgewidth=0)
        mean = statistics.fmean(values)
        left.plot([mean, mean], [place - 0.28, place + 0.28], color=colour, linewidth=2.4)
        gain = group.gain(arm, split)
        if gain is not None:
            right.errorbar(gain.mean, place, xerr=gain.half, fmt="o", color=colour, capsize=3, markersize=5)
    teacher = group.teacher.value(split) if group.teacher else None
    if teacher is not None:
        left.axvline(teacher, color=COLOURS[1], linestyle="--", linewidth=1.3)
        side = "left" if teacher < statistics.fmean(left.get_xlim()) else "right"  # inside the axes
        left.text(teacher, len(arms) - 0.45, " teacher ", color=COLOURS[1], ha=side, va="bottom", fontsize=8)
    right.axvline(0, color=_BASE, linewidth=1)
    left.set_yticks(list(places), [f"{arm.name} ({arm.epochs})" for arm in arms])
    left.set_ylim(-0.6, len(arms) - 0.1)
    left.set_xlabel(f"mAP50-95 on {split}, %: seeds and mean")
    base = group.baseline.name if group.baseline else "the baseline"
    right.set_xlabel(f"difference to {base}, points, 95 % interval")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{group.data}, {group.student}, {split} (epochs in brackets)", fontsize=10)
    figure.savefig(file, format="png")
