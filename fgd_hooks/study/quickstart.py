"""The quickstart: draw data, train a teacher, then the same student without and with FGD, and compare.

Everything runs on two CPU cores in at most ten minutes and downloads nothing. The two students of a seed differ in
nothing but what the teacher gives, where the student begins and the distillation: same batches, settings and epochs.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgd_hooks.study.processes import read_json, write_json
from fgd_hooks.study.quickstart_processes import progress_display, run_jobs
from fgd_hooks.study.quickstart_report import Comparison, comparison_table, write_report
from fgd_hooks.study.quickstart_train import FIXED, Job
from fgd_hooks.study.scenes import DRAWING, SceneSettings, make_dataset

if TYPE_CHECKING:
    from rich.console import Console


STUDENT = Path(__file__).with_name("quickstart_student.yaml")


@dataclass(frozen=True)
class QuickstartSettings:
    """Sizes and budgets. The defaults take at most ten minutes on two idle CPU cores with one seed.

    Attributes:
        scenes: the data set.
        teacher: model yaml of the teacher.
        teacher_epochs: how long the teacher is trained.
        teacher_seed: of the teacher; one teacher serves all seeds of the students.
        student: model yaml of the student.
        student_epochs: how long both students are trained.
        batch: images per optimizer step.
        lr: learning rate after the warm-up.
        val_every: the students are validated every so many epochs, for the curves.
        device: as in Ultralytics; the budget is meant for "cpu".
        fgd: settings of the distillation that differ from the library's defaults, as `FGDCallback` takes them.
    """

    scenes: SceneSettings = field(default_factory=SceneSettings)
    teacher: str = "yolov8n.yaml"
    teacher_epochs: int = 28
    teacher_seed: int = 0
    student: str = str(STUDENT)
    student_epochs: int = 28
    batch: int = 8
    lr: float = 3e-3
    val_every: int = 4
    device: str = "cpu"
    fgd: dict[str, Any] = field(default_factory=dict)


def quickstart(
    out: str | Path,
    seeds: Sequence[int] = (0,),
    *,
    settings: QuickstartSettings | None = None,
    console: Console | None = None,
) -> Comparison:
    """Run the whole comparison and print its table.

    Writes into ``out``: ``data/``, one folder per training (Ultralytics' own files, TensorBoard events, ``train.log``,
    ``summary.json``), ``report.md``, ``curves.png`` and ``results.json``. The teacher of an earlier call is used again
    when its settings are the same and its training was finished; the students are always trained anew.

    Args:
        out: folder to write to, made when missing.
        seeds: one pair of students is trained for each.
        settings: sizes and budgets.
        console: where table and progress are printed; by default the terminal.

    Raises:
        QuickstartError: a training failed.
        ValueError: no seed, or one twice.
    """
    from rich.console import Console

    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be one or more different numbers, got {list(seeds)}")
    settings = settings or QuickstartSettings()
    console = console or Console()
    out = Path(out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with progress_display(console) as progress:
        drawing = progress.add_task("drawing the data", total=1.0, note="")
        make_dataset(out / "data", settings.scenes)
        progress.update(drawing, completed=1.0)
        cores = free_cores()
        teacher_job = make_teacher_job(out, settings, cores)
        if teacher_is_ready(teacher_job):
            progress.add_task("teacher", total=1, completed=1, note="from an earlier run")
        else:
            run_jobs([teacher_job], progress)
            mark_teacher(teacher_job)
        pairs = [make_student_jobs(out, settings, seed, teacher_job, max(1, cores // 2)) for seed in seeds]
        jobs = [job for pair in pairs for job in pair]
        run_jobs(jobs, progress)
    summaries = {job.name: read_json(Path(job.folder) / "summary.json") for job in (teacher_job, *jobs)}
    teacher = summaries[teacher_job.name]
    result = Comparison.from_summaries(
        teacher,
        alone=[summaries[f"alone-s{seed}"] for seed in seeds],
        fgd=[summaries[f"fgd-s{seed}"] for seed in seeds],
    )
    report = write_report(out, result)
    console.print(comparison_table(result))
    minutes = (time.perf_counter() - started) / 60
    console.print(f"{minutes:.1f} minutes in all. Report: {report}")
    console.print(f"Look closer: tensorboard --logdir {out}")
    return result


def make_teacher_job(out: Path, settings: QuickstartSettings, threads: int = 1) -> Job:
    """The teacher's training; the folder's name carries a key of everything that shapes the teacher."""
    wanted = json.dumps(_teacher_identity(settings), sort_keys=True)
    key = hashlib.sha256(wanted.encode()).hexdigest()[:10]
    return _job(
        out,
        settings,
        name=f"teacher-{key}",
        model=settings.teacher,
        epochs=settings.teacher_epochs,
        seed=settings.teacher_seed,
        threads=threads,
        val_every=settings.teacher_epochs,
    )


def make_student_jobs(
    out: Path, settings: QuickstartSettings, seed: int, teacher: Job, threads: int = 1
) -> tuple[Job, Job]:
    """The student with FGD and the student alone, for one seed; they differ in ``teacher`` and ``fgd`` only."""
    common: dict[str, Any] = {
        "model": settings.student,
        "epochs": settings.student_epochs,
        "seed": seed,
        "threads": threads,
        "val_every": settings.val_every,
    }
    weights = str(_weights(teacher))
    return (
        _job(out, settings, name=f"fgd-s{seed}", **common, teacher=weights, fgd=settings.fgd),
        _job(out, settings, name=f"alone-s{seed}", **common),
    )


def teacher_is_ready(job: Job) -> bool:
    """Whether the folder holds a teacher of exactly this job, trained to the end and unchanged since."""
    folder = Path(job.folder)
    try:
        marker = read_json(folder / "finished.json")
        weights = _digest(_weights(job))
        summary = read_json(folder / "summary.json")
    except (OSError, ValueError):
        return False
    wanted = {"job": _lasting(job), "fixed": FIXED, "weights": weights}
    return bool(marker == json.loads(json.dumps(wanted)) and summary["job"]["name"] == job.name)


def mark_teacher(job: Job) -> None:
    """Note that the teacher's training is finished; nothing without this note is used again."""
    content = {"job": _lasting(job), "fixed": FIXED, "weights": _digest(_weights(job))}
    write_json(Path(job.folder) / "finished.json", content)


def _job(out: Path, settings: QuickstartSettings, **values: Any) -> Job:
    """A job with what all of them share."""
    return Job(
        folder=str(out / values["name"]),
        data=str(out / "data" / "data.yaml"),
        truth=str(out / "data" / "annotations" / "instances_val.json"),
        imgsz=settings.scenes.size,
        batch=settings.batch,
        lr=settings.lr,
        device=settings.device,
        **values,
    )


def _teacher_identity(settings: QuickstartSettings) -> dict[str, Any]:
    """Everything that shapes the teacher; the student's settings do not."""
    from ultralytics import __version__

    model = Path(settings.teacher)
    return {
        "scenes": asdict(settings.scenes) | {"drawing": DRAWING},
        "model": model.read_text() if model.is_file() else settings.teacher,
        "epochs": settings.teacher_epochs,
        "seed": settings.teacher_seed,
        "batch": settings.batch,
        "lr": settings.lr,
        "fixed": FIXED,
        "ultralytics": __version__,
    }


def _lasting(job: Job) -> dict[str, Any]:
    """A job without what does not change its result: where it lies and how many threads it ran on."""
    return {k: v for k, v in job.to_dict().items() if k not in ("folder", "data", "truth", "threads", "device")}


def _weights(job: Job) -> Path:
    return Path(job.folder) / "weights" / "last.pt"


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def free_cores() -> int:
    """CPU cores that this process may use and that nothing else keeps busy now: 1 to 8.

    Threads of one training wait for each other, so one more thread than free cores makes it many times slower; and
    these models are too small for more than eight.
    """
    import psutil  # type: ignore[import-untyped]

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = psutil.cpu_percent(interval=1.0) / 100 * (os.cpu_count() or 1)
    return int(min(max(round(usable - busy), 1), 8))
