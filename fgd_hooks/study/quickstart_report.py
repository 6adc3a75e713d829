"""What the quickstart found: one table, a report in Markdown, and a picture of the training curves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgd_hooks.evaluation.reporting import Curve, Table, draw_curves, spread
from fgd_hooks.study.processes import write_json

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Run:
    """One finished training.

    Attributes:
        seed: of the run.
        map50_95: of the last weights on the validation images, 0 to 1, by pycocotools.
        map50: the same at IoU 0.50.
        per_class: class name -> average precision (0.50 to 0.95), None for a class without boxes.
        parameters: of the model.
        gflops: billions of floating point operations for one image; 0 where it could not be counted.
        minutes: of training, wall time.
        cpu_minutes: of training, CPU time of all threads.
        curve: (epoch, mAP50-95 as Ultralytics' validator measured it during the training).
        batches: checksum of all training batches.
    """

    seed: int
    map50_95: float
    map50: float
    per_class: dict[str, float | None]
    parameters: int
    gflops: float
    minutes: float
    cpu_minutes: float
    curve: tuple[tuple[int, float], ...]
    batches: int

    @classmethod
    def from_summary(cls, summary: dict[str, Any]) -> Run:
        """From the ``summary.json`` of a training."""
        metrics = summary["metrics"]
        return cls(
            seed=int(summary["job"]["seed"]),
            map50_95=float(metrics["map50_95"] or 0.0),
            map50=float(metrics["map50"] or 0.0),
            per_class={entry["name"]: entry["map50_95"] for entry in metrics["per_class"]},
            parameters=int(summary["parameters"]),
            gflops=float(summary["gflops"]),
            minutes=float(summary["seconds"]) / 60,
            cpu_minutes=float(summary["cpu_seconds"]) / 60,
            curve=tuple((int(epoch), float(value)) for epoch, value in summary["curve"]),
            batches=int(summary["batches"]),
        )


@dataclass(frozen=True)
class Comparison:
    """All trainings of a quickstart; ``alone`` and ``fgd`` hold one run per seed, in the same order.

    Attributes:
        teacher: the teacher's run.
        alone: students without a teacher.
        fgd: the same students with FGD.
        settings: what all trainings share, for the report.
    """

    teacher: Run
    alone: tuple[Run, ...]
    fgd: tuple[Run, ...]
    settings: dict[str, Any]

    @classmethod
    def from_summaries(
        cls, teacher: dict[str, Any], alone: Sequence[dict[str, Any]], fgd: Sequence[dict[str, Any]]
    ) -> Comparison:
        """From the summaries of the trainings.

        Raises:
            ValueError: the students' seeds do not go together.
        """
        result = cls(
            teacher=Run.from_summary(teacher),
            alone=tuple(Run.from_summary(s) for s in alone),
            fgd=tuple(Run.from_summary(s) for s in fgd),
            settings={
                "teacher": {k: teacher["job"][k] for k in ("model", "epochs")},
                "student": {
                    **{k: alone[0]["job"][k] for k in ("epochs", "imgsz", "batch", "lr")},
                    "model": Path(alone[0]["job"]["model"]).name,  # not where it lies on this machine
                },
                "images": teacher["metrics"]["images"],
                "start": fgd[0].get("start", ""),
            },
        )
        if [run.seed for run in result.alone] != [run.seed for run in result.fgd]:
            raise ValueError(
                f"students alone have the seeds {[run.seed for run in result.alone]}, "
                f"students with FGD {[run.seed for run in result.fgd]}; expected the same"
            )
        return result

    @property
    def gains(self) -> list[float]:
        """mAP50-95 with FGD less mAP50-95 alone, for each seed, in points (per cent)."""
        return [100 * (f.map50_95 - a.map50_95) for f, a in zip(self.fgd, self.alone, strict=True)]

    @property
    def same_batches(self) -> bool:
        """Whether both students of every seed were fed the same batches, pixel by pixel and in the same order."""
        return all(f.batches == a.batches for f, a in zip(self.fgd, self.alone, strict=True))


def comparison_table(result: Comparison) -> RichTable:
    """One row for the teacher, the students alone and the students with FGD; means where there are several seeds."""
    title = f"validation, {result.settings['images']} images, pycocotools; per cent"
    caption = f"FGD - alone: {_gain_text(result)} points of mAP50-95"
    return Table(_HEADINGS, _rows(result), title, caption).rich()


_HEADINGS = ("model", "mAP50-95", "mAP50", "parameters", "GFLOPs", "minutes")


def _rows(result: Comparison) -> list[tuple[str, ...]]:
    """The cells of the table, as text."""
    rows: list[tuple[str, ...]] = []
    for name, runs in (("teacher", (result.teacher,)), ("student alone", result.alone), ("student + FGD", result.fgd)):
        flops = runs[0].gflops
        rows.append(
            (
                name,
                spread([100 * run.map50_95 for run in runs]),
                spread([100 * run.map50 for run in runs]),
                f"{runs[0].parameters / 1e6:.2f} M",
                f"{flops:.2f}" if flops else "-",
                f"{statistics.fmean(run.minutes for run in runs):.1f}",
            )
        )
    return rows


def _gain_text(result: Comparison) -> str:
    """`+3.1`, or for several seeds `+3.1 (per seed +2.8, +3.4)`."""
    gains = result.gains
    mean = f"{statistics.fmean(gains):+.1f}"
    return f"{mean} (per seed {', '.join(f'{gain:+.1f}' for gain in gains)})" if len(gains) > 1 else mean


def markdown(result: Comparison) -> str:
    """The report as Markdown."""
    shared, teacher = result.settings["student"], result.settings["teacher"]
    seeds = ", ".join(str(run.seed) for run in result.alone)
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
        f"- teacher: `{Path(teacher['model']).name}`, {teacher['epochs']} epochs from random weights",
        f"- student: `{Path(shared['model']).name}`, {shared['epochs']} epochs from random weights, the same budget "
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


def _start_text(result: Comparison) -> list[str]:
    """What the students with FGD took over from the teacher before their first step."""
    start = result.settings.get("start")
    if not start:
        return []
    return [
        f"- the students with FGD begin as thinned teachers (`{start.rstrip('.')}`); `fgd study "
        "configs/studies/scenes.yaml` tells what comes of that alone (`start`) and of FGD alone (`without_start`)"
    ]


def _batches_text(result: Comparison) -> str:
    if result.same_batches:
        return "both students of a seed were fed the same batches, pixel by pixel (compared by checksum)"
    return (
        "WARNING: the two students of a seed were not fed the same batches, so part of the difference may come from "
        "the order or the augmentation of the images"
    )


def _class_rows(result: Comparison) -> list[tuple[str, ...]]:
    """Average precision of each class, as text."""
    rows = []
    for name in result.teacher.per_class:
        cells = []
        for runs in ((result.teacher,), result.alone, result.fgd):
            values = [value for run in runs if (value := run.per_class[name]) is not None]
            cells.append(f"{100 * statistics.fmean(values):.1f}" if values else "-")
        rows.append((name, *cells))
    return rows


def draw(result: Comparison, file: Path) -> None:
    """Draw the validation mAP of all students over the epochs, and the teacher's final one, as a PNG."""
    arms = (("student with FGD", result.fgd), ("student alone", result.alone))
    curves = [
        Curve(name, [epoch for epoch, _ in runs[0].curve], [[100 * value for _, value in run.curve] for run in runs])
        for name, runs in arms
    ]
    teacher = ("teacher", 100 * result.teacher.curve[-1][1]) if result.teacher.curve else None
    seeds = (
        f"seed {result.alone[0].seed}"
        if len(result.alone) == 1
        else f"mean of {len(result.alone)} seeds; band: one standard deviation"
    )
    draw_curves(
        curves,
        file,
        title=f"The same student, without and with FGD ({seeds})",
        ylabel="mAP50-95 on the validation images, %",
        reference=teacher,
    )


def write_report(out: Path, result: Comparison) -> Path:
    """Write ``report.md``, ``curves.png`` and ``results.json`` into a folder; returns the report's path."""
    out.mkdir(parents=True, exist_ok=True)
    draw(result, out / "curves.png")
    write_json(
        out / "results.json",
        {
            "teacher": vars(result.teacher),
            "alone": [vars(run) for run in result.alone],
            "fgd": [vars(run) for run in result.fgd],
            "gains": result.gains,
            "same_batches": result.same_batches,
            "settings": result.settings,
        },
    )
    report = out / "report.md"
    report.write_text(markdown(result), encoding="utf-8")
    return report
