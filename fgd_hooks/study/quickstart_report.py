"""What the quickstart found: one table, a report in Markdown, and a picture of the training curves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgd_hooks.evaluation.reporting import Curve, Table, draw_curves, spread
from fgd_hooks.utils.files import write_json

if TYPE_CHECKING:
    from rich.table import Table as RichTable


_HEADINGS = ("model", "mAP50-95", "mAP50", "parameters", "GFLOPs", "minutes")

Figures = dict[str, Any]
"""One finished training: see :func:`figures`."""


def figures(result: dict[str, Any]) -> Figures:
    """What the report shows of a training, from its ``result.json``.

    ``map50_95`` and ``map50`` (of the last weights on the validation images, 0 to 1, by pycocotools), ``per_class``
    (name -> average precision, None for a class without boxes), ``parameters``, ``gflops`` (for one image, 0 where they
    could not be counted), ``minutes`` (wall time of the training), ``cpu_minutes`` (of all threads), ``curve`` (epoch,
    mAP50-95 by Ultralytics' validator), ``batches`` (a checksum of them) and the ``seed``.
    """
    found = result["results"]["val"]
    return {
        "seed": result["seed"],
        "map50_95": found["map50_95"] or 0.0,
        "map50": found["map50"] or 0.0,
        "per_class": {entry["name"]: entry["map50_95"] for entry in found["per_class"]},
        "parameters": result["parameters"],
        "gflops": result["gflops"],
        "minutes": result["wall_s"] / 60,
        "cpu_minutes": result["cpu_s"] / 60,
        "curve": result["curve"],
        "batches": result["batches"],
    }


@dataclass(frozen=True)
class QuickstartResult:
    """All trainings of a quickstart; ``alone`` and ``fgd`` hold one run per seed, in the same order.

    Attributes:
        teacher: the teacher's run.
        alone: students without a teacher.
        fgd: the same students with FGD.
        settings: what all trainings share, for the report.
    """

    teacher: Figures
    alone: list[Figures]
    fgd: list[Figures]
    settings: dict[str, Any]

    @classmethod
    def from_results(
        cls, teacher: dict[str, Any], alone: Sequence[dict[str, Any]], fgd: Sequence[dict[str, Any]]
    ) -> QuickstartResult:
        """From the results of the trainings."""
        seeds = [[run["seed"] for run in runs] for runs in (alone, fgd)]
        if seeds[0] != seeds[1]:
            raise ValueError(f"students alone have the seeds {seeds[0]}, with FGD {seeds[1]}; expected the same")
        student = alone[0]
        shared = {"imgsz": student["settings"]["imgsz"], "batch": student["settings"]["batch"]}
        settings = {
            "teacher": {"model": teacher["student"], "epochs": teacher["epochs"]},
            "student": {
                "model": student["student"],
                "epochs": student["epochs"],
                **shared,
                "lr": student["settings"]["lr0"],
            },
            "images": teacher["results"]["val"]["images"],
            "start": fgd[0]["inherited"],
        }
        return cls(figures(teacher), [figures(run) for run in alone], [figures(run) for run in fgd], settings)

    @property
    def models(self) -> dict[str, list[Figures]]:
        """The runs of each row of the table."""
        return {"teacher": [self.teacher], "student alone": self.alone, "student + FGD": self.fgd}

    @property
    def gains(self) -> list[float]:
        """mAP50-95 with FGD less mAP50-95 alone, for each seed, in points (per cent)."""
        return [100 * (f["map50_95"] - a["map50_95"]) for f, a in zip(self.fgd, self.alone, strict=True)]

    @property
    def same_batches(self) -> bool:
        """Whether both students of every seed were fed the same batches, pixel by pixel and in the same order."""
        return all(f["batches"] == a["batches"] for f, a in zip(self.fgd, self.alone, strict=True))


def comparison_table(result: QuickstartResult) -> RichTable:
    """One row for the teacher, the students alone and the students with FGD; means where there are several seeds."""
    title = f"validation, {result.settings['images']} images, pycocotools; per cent"
    caption = f"FGD - alone: {_gain_text(result)} points of mAP50-95"
    return Table(_HEADINGS, _rows(result), title, caption).rich()


def _rows(result: QuickstartResult) -> list[tuple[str, ...]]:
    """The cells of the table, as text."""
    return [
        (
            name,
            spread([100 * run["map50_95"] for run in runs]),
            spread([100 * run["map50"] for run in runs]),
            f"{runs[0]['parameters'] / 1e6:.2f} M",
            f"{runs[0]['gflops']:.2f}" if runs[0]["gflops"] else "-",
            f"{statistics.fmean(run['minutes'] for run in runs):.1f}",
        )
        for name, runs in result.models.items()
    ]


def _gain_text(result: QuickstartResult) -> str:
    """`+3.1`, or for several seeds `+3.1 (per seed +2.8, +3.4)`."""
    gains = result.gains
    mean = f"{statistics.fmean(gains):+.1f}"
    return f"{mean} (per seed {', '.join(f'{gain:+.1f}' for gain in gains)})" if len(gains) > 1 else mean


def markdown(result: QuickstartResult) -> str:
    """The report as Markdown."""
    shared, teacher = result.settings["student"], result.settings["teacher"]
    seeds = ", ".join(str(run["seed"]) for run in result.alone)
    lines = [
        "# Quickstart: one student, without and with FGD",
        "",
        *Table(_HEADINGS, _rows(result)).markdown(),
        "",
        f"With FGD less alone: **{_gain_text(result)}** points of mAP50-95 (seeds: {seeds}).",
        "",
        f"All figures: {result.settings['images']} drawn validation images, last weights, measured by pycocotools, per "
        "cent. Minutes are wall time of the training; the two students of a seed run side by side, so neither has the "
        "machine to itself.",
        "",
        "## What was trained",
        "",
        f"- teacher: `{teacher['model']}`, {teacher['epochs']} epochs from random weights",
        f"- student: `{shared['model']}`, {shared['epochs']} epochs from random weights, the same budget "
        "without and with FGD",
        *_start_text(result),
        f"- both: {shared['imgsz']} px, batch {shared['batch']}, AdamW, learning rate {shared['lr']:g} falling to a "
        "hundredth",
        f"- {_batches_text(result)}",
        "",
        "One seed does not tell the size of the effect: two students that differ in nothing but the seed lay up to "
        "3 points apart in this project's studies, and more with few images. Use three seeds or more before you "
        "believe a difference of that size.",
        "",
        "## By class",
        "",
        *Table(("class", "teacher", "alone", "FGD"), _class_rows(result)).markdown(),
        "",
        "## Curves",
        "",
        "![mAP50-95 on the validation images over the epochs](curves.png)",
        "",
        "The curves are what Ultralytics' own validation gave during the training; it differs from pycocotools by some "
        "tenths of a point.",
        "",
    ]
    return "\n".join(lines)


def _start_text(result: QuickstartResult) -> list[str]:
    """What the students with FGD took over from the teacher before their first step."""
    start = result.settings.get("start")
    if not start:
        return []
    return [
        f"- the students with FGD begin as thinned teachers (`{start.rstrip('.')}`); `fgd study "
        "configs/studies/scenes.yaml` tells what comes of that alone (`start`) and of FGD alone (`without_start`)"
    ]


def _batches_text(result: QuickstartResult) -> str:
    if result.same_batches:
        return "both students of a seed were fed the same batches, pixel by pixel (compared by checksum)"
    return (
        "WARNING: the two students of a seed were not fed the same batches, so part of the difference may come from "
        "the order or the augmentation of the images"
    )


def _class_rows(result: QuickstartResult) -> list[tuple[str, ...]]:
    """Average precision of each class, as text."""
    rows = []
    for name in result.teacher["per_class"]:
        found = [[run["per_class"][name] for run in runs] for runs in result.models.values()]
        values = [[100 * value for value in each if value is not None] for each in found]
        rows.append((name, *(f"{statistics.fmean(each):.1f}" if each else "-" for each in values)))
    return rows


def draw(result: QuickstartResult, file: Path) -> None:
    """Draw the validation mAP of all students over the epochs, and the teacher's final one, as a PNG."""
    curves = []
    for name, runs in (("student with FGD", result.fgd), ("student alone", result.alone)):
        values = [[100 * value for _, value in run["curve"]] for run in runs]
        curves.append(Curve(name, [epoch for epoch, _ in runs[0]["curve"]], values))
    many = f"mean of {len(result.alone)} seeds; band: one standard deviation"
    seeds = f"seed {result.alone[0]['seed']}" if len(result.alone) == 1 else many
    draw_curves(
        curves,
        file,
        title=f"The same student, without and with FGD ({seeds})",
        ylabel="mAP50-95 on the validation images, %",
        reference=("teacher", 100 * result.teacher["curve"][-1][1]) if result.teacher["curve"] else None,
    )


def write_report(out: Path, result: QuickstartResult) -> Path:
    """Write ``report.md``, ``curves.png`` and ``results.json`` into a folder; returns the report's path."""
    out.mkdir(parents=True, exist_ok=True)
    draw(result, out / "curves.png")
    write_json(out / "results.json", {**vars(result), "gains": result.gains, "same_batches": result.same_batches})
    report = out / "report.md"
    report.write_text(markdown(result), encoding="utf-8")
    return report
