"""The quickstart: draw data, train a teacher, then the same student without and with FGD, and compare.

A study that is written out in code. Everything runs on two CPU cores in at most ten minutes and downloads nothing. The
two students of a seed differ in nothing but what the teacher gives, where the student begins and the distillation:
same batches, settings and epochs.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgd_hooks.errors import ConfigError, QuickstartError, needs_extra
from fgd_hooks.evaluation.reporting import plain
from fgd_hooks.study.lease import in_progress
from fgd_hooks.study.plan import Planner, Run
from fgd_hooks.study.quickstart_report import QuickstartResult, comparison_table, write_report
from fgd_hooks.study.runner import Runner, progress_display
from fgd_hooks.study.scenes import SceneSettings
from fgd_hooks.study.spec import ArmSpec, DataSpec, StudentSpec, StudySpec, TeacherSpec
from fgd_hooks.study.worker import digest
from fgd_hooks.utils.recipes import recipes_folder

if TYPE_CHECKING:
    from rich.console import Console

STUDENT = recipes_folder() / "models" / "quickstart.yaml"


@dataclass(frozen=True)
class QuickstartSettings:
    """Sizes and budgets. The defaults take at most ten minutes on two idle CPU cores with one seed."""

    scenes: SceneSettings = field(default_factory=SceneSettings)  # the data set
    teacher: str = "yolov8n.yaml"  # model yaml of the teacher
    teacher_epochs: int = 28  # how long the teacher is trained
    teacher_seed: int = 0  # one teacher serves all seeds of the students
    student: str = str(STUDENT)  # model yaml of the student
    student_epochs: int = 28  # how long both students are trained
    batch: int = 8  # images per optimizer step
    lr: float = 3e-3  # learning rate after the warm-up
    val_every: int = 4  # the students are validated every so many epochs, for the curves
    device: str = "cpu"  # as in Ultralytics; the budget is meant for the CPU
    fgd: dict[str, Any] = field(default_factory=dict)  # of the distillation, where it differs from the defaults

    def study(self, seeds: Sequence[int]) -> StudySpec:
        """The study that trains this; the drawn set's val is what its tables show."""
        scenes = DataSpec(
            scenes=asdict(self.scenes),
            train={"imgsz": self.scenes.size, "batch": self.batch, "nbs": self.batch, "lr0": self.lr},
            teacher=TeacherSpec(model=self.teacher, epochs=self.teacher_epochs, seed=self.teacher_seed),
        )
        return StudySpec(
            name="quickstart",
            epochs=self.student_epochs,
            seeds=list(seeds),
            train={"cache": "ram", "verbose": False},
            student=StudentSpec(model=self.student),
            data={"scenes": scenes},
            arms={"fgd": ArmSpec(fgd=self.fgd), "alone": ArmSpec(kind="alone")},
        )


def quickstart(
    out: str | Path,
    seeds: Sequence[int] = (0,),
    *,
    settings: QuickstartSettings | None = None,
    console: Console | None = None,
) -> QuickstartResult:
    """Run the whole comparison and print its table.

    Writes into ``out``: ``data/``, one folder per training (Ultralytics' own files, TensorBoard events, ``train.log``,
    ``result.json``), ``report.md``, ``curves.png`` and ``results.json``. The teacher of an earlier call is used again
    when its settings are the same and its training was finished; the students are always trained anew.
    """
    with needs_extra("ultralytics"):
        from rich.console import Console

    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(f"seeds must be one or more different numbers, got {list(seeds)}")
    settings = settings or QuickstartSettings()
    console = console or Console()
    out = Path(out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with progress_display(console) as progress:
        drawing = progress.add_task("drawing the data", total=1.0, note="")
        runs = Planner(settings.study(seeds), out / "quickstart", out).plan().runs
        progress.update(drawing, completed=1.0)
        teacher = next(run for run in runs if run.kind == "teacher")
        students = [run for run in runs if run is not teacher]
        ready = teacher_is_ready(teacher)
        for run in students if ready else runs:
            if not in_progress(run.folder):
                shutil.rmtree(run.folder, ignore_errors=True)
        if ready:
            progress.add_task("teacher", total=1, completed=1, note="from an earlier run")
        cores = free_cores()
        for part, jobs, threads, every in (
            ([teacher], 1, cores, settings.teacher_epochs),
            (students, 2, max(1, cores // 2), settings.val_every),
        ):
            Runner(
                jobs,
                [settings.device],
                threads,
                val_every=every,
                progress=progress,
                keep_bars=True,
                say=_ignore,
                fail=_give_up,
            ).run(part)
    found = {kind: [run.result() or {} for run in runs if run.kind == kind] for kind in ("teacher", "alone", "fgd")}
    result = QuickstartResult.from_results(found["teacher"][0], found["alone"], found["fgd"])
    report = write_report(out, result)
    console.print(comparison_table(result))
    minutes = (time.perf_counter() - started) / 60
    console.print(plain(f"{minutes:.1f} minutes in all. Report: {report}"))
    console.print(plain(f"Look closer: tensorboard --logdir {out}"))
    return result


def teacher_is_ready(run: Run) -> bool:
    """Whether an earlier call has trained exactly this teacher to the end, with this Ultralytics, and it lies there."""
    from ultralytics import __version__

    found = run.result()
    if found is None or not run.weights.is_file():
        return False
    return bool(found["versions"]["ultralytics"] == __version__ and found["weights"] == digest(run.weights))


def _ignore(text: str) -> None:
    """The bars say it."""


def _give_up(text: str) -> None:
    raise QuickstartError(text)


def free_cores() -> int:
    """CPU cores that this process may use and that nothing else keeps busy now: 1 to 8.

    Threads of one training wait for each other, so one more thread than free cores makes it many times slower; and
    these models are too small for more than eight.
    """
    with needs_extra("ultralytics"):
        import psutil  # type: ignore[import-untyped]

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = psutil.cpu_percent(interval=1.0) / 100 * (os.cpu_count() or 1)
    return int(min(max(round(usable - busy), 1), 8))
