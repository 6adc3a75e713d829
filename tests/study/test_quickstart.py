"""How the quickstart arranges its trainings: which teacher it uses again, what the arms differ in, how it fails."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

pytest.importorskip("ultralytics")

from fgd_hooks.errors import QuickstartError
from fgd_hooks.study import quickstart as quickstart_run
from fgd_hooks.study.quickstart import (
    STUDENT,
    QuickstartSettings,
    free_cores,
    make_student_jobs,
    make_teacher_job,
    mark_teacher,
    quickstart,
    teacher_is_ready,
)
from fgd_hooks.study.quickstart_processes import run_jobs
from fgd_hooks.study.quickstart_train import Job
from fgd_hooks.study.scenes import SceneSettings

SETTINGS = QuickstartSettings()


def finish(job: Job) -> Path:
    """Put down what a finished training leaves; returns the weights file."""
    folder = Path(job.folder)
    weights = folder / "weights" / "last.pt"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    (folder / "summary.json").write_text(json.dumps({"job": job.to_dict()}))
    mark_teacher(job)
    return weights


def test_a_finished_teacher_is_used_again(tmp_path: Path) -> None:
    job = make_teacher_job(tmp_path, SETTINGS)
    assert not teacher_is_ready(job)
    finish(job)
    assert teacher_is_ready(job)
    assert teacher_is_ready(make_teacher_job(tmp_path, dataclasses.replace(SETTINGS, student_epochs=3, val_every=1)))


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": "yolov8s.yaml"},
        {"teacher_epochs": 41},
        {"teacher_seed": 1},
        {"batch": 16},
        {"lr": 1e-3},
        {"scenes": SceneSettings(train=321, val=100)},
        {"scenes": SceneSettings(train=320, val=100, seed=1)},
    ],
)
def test_a_teacher_of_other_settings_is_not_used(tmp_path: Path, change: dict[str, Any]) -> None:
    job = make_teacher_job(tmp_path, SETTINGS)
    finish(job)
    other = make_teacher_job(tmp_path, dataclasses.replace(SETTINGS, **change))
    assert other.folder != job.folder
    assert not teacher_is_ready(other)


def test_a_changed_model_yaml_of_the_same_name_is_another_teacher(tmp_path: Path) -> None:
    model = tmp_path / "teacher.yaml"
    model.write_text("width_multiple: 0.25")
    settings = dataclasses.replace(SETTINGS, teacher=str(model))
    finish(make_teacher_job(tmp_path, settings))
    model.write_text("width_multiple: 0.5")
    assert not teacher_is_ready(make_teacher_job(tmp_path, settings))


def test_an_unfinished_or_changed_teacher_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_teacher_job(tmp_path, SETTINGS)
    weights = finish(job)
    weights.write_bytes(b"other weights")
    assert not teacher_is_ready(job)
    weights.write_bytes(b"weights")
    assert teacher_is_ready(job)
    with monkeypatch.context() as patch:
        patch.setattr(quickstart_run, "FIXED", {**quickstart_run.FIXED, "weight_decay": 0.1})
        assert not teacher_is_ready(job)
    (Path(job.folder) / "finished.json").write_text("{")
    assert not teacher_is_ready(job)
    mark_teacher(job)
    (Path(job.folder) / "summary.json").unlink()
    assert not teacher_is_ready(job)


def test_the_arms_differ_in_the_distillation_only(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, fgd={"weight": 2.0})
    teacher = make_teacher_job(tmp_path, settings)
    fgd, alone = (job.to_dict() for job in make_student_jobs(tmp_path, settings, 3, teacher, threads=2))
    different = {key for key in fgd if fgd[key] != alone[key]}
    assert different == {"name", "folder", "teacher", "fgd"}
    assert alone["teacher"] is None
    assert fgd["teacher"] == str(Path(teacher.folder) / "weights" / "last.pt")
    assert fgd["fgd"] == {"weight": 2.0}
    assert fgd["seed"] == 3


@pytest.mark.parametrize(("busy_percent", "threads"), [(0.0, 4), (20.0, 3), (60.0, 2), (100.0, 1)])
def test_threads_leave_out_the_cores_that_others_use(
    monkeypatch: pytest.MonkeyPatch, busy_percent: float, threads: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: busy_percent)
    assert free_cores() == threads


def script(tmp_path: Path, text: str) -> list[str]:
    """A program that stands in for a training."""
    file = tmp_path / "stand_in.py"
    file.write_text("import json, pathlib, sys, time\njob = json.loads(pathlib.Path(sys.argv[1]).read_text())\n" + text)
    return [sys.executable, str(file)]


def jobs(tmp_path: Path, *names: str) -> list[Job]:
    template = make_teacher_job(tmp_path, SETTINGS)
    return [dataclasses.replace(template, name=name, folder=str(tmp_path / name)) for name in names]


def test_all_jobs_run_and_each_gets_a_line(tmp_path: Path) -> None:
    command = script(tmp_path, "pathlib.Path('summary.json').write_text(json.dumps(job['name']))")
    with Progress(console=Console(quiet=True)) as progress:
        run_jobs(jobs(tmp_path, "teacher-x", "alone-s0", "fgd-s0"), progress, command)
    assert [line.description for line in progress.tasks] == ["teacher", "alone, seed 0", "fgd, seed 0"]
    assert all(line.finished for line in progress.tasks)
    assert json.loads((tmp_path / "fgd-s0" / "summary.json").read_text()) == "fgd-s0"


def test_a_failed_training_shows_the_end_of_its_log_and_stops_the_other(tmp_path: Path) -> None:
    command = script(
        tmp_path,
        "if job['name'] == 'slow':\n"
        "    pathlib.Path('started').touch()\n"
        "    time.sleep(60)\n"
        "while not pathlib.Path('../slow/started').exists():\n"
        "    time.sleep(0.02)\n"
        "print('first words'); print('\\n' * 40); print('0%\\r100% of an epoch'); sys.exit('no such layer')",
    )
    started = time.monotonic()
    with Progress(console=Console(quiet=True)) as progress, pytest.raises(QuickstartError) as error:
        run_jobs(jobs(tmp_path, "slow", "broken"), progress, command)
    assert time.monotonic() - started < 30
    text = str(error.value)
    assert "'broken' failed (exit code 1)" in text and "train.log" in text
    assert "no such layer" in text and "  100% of an epoch" in text


def test_a_training_without_summary_has_failed_and_an_old_one_does_not_count(tmp_path: Path) -> None:
    (job,) = jobs(tmp_path, "silent")
    Path(job.folder).mkdir()
    for leftover in ("job.json", "summary.json"):
        (Path(job.folder) / leftover).write_text("{}")
    with Progress(console=Console(quiet=True)) as progress, pytest.raises(QuickstartError, match="exit code 0"):
        run_jobs([job], progress, script(tmp_path, ""))


@pytest.mark.parametrize("seeds", [(), (1, 1)])
def test_seeds_must_be_different_numbers(tmp_path: Path, seeds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="different numbers"):
        quickstart(tmp_path, seeds)


@pytest.mark.slow
def test_the_whole_thing_and_then_once_more(tmp_path: Path) -> None:
    from ultralytics.utils import SETTINGS_FILE

    before = Path(SETTINGS_FILE).read_bytes()
    settings = QuickstartSettings(
        scenes=SceneSettings(train=16, val=8, size=64),
        teacher=str(STUDENT),
        teacher_epochs=2,
        student_epochs=3,
        val_every=2,
    )
    console = Console(width=120, force_terminal=False)
    with console.capture() as captured:
        result = quickstart(tmp_path, (0,), settings=settings, console=console)
    assert "student + FGD" in captured.get()
    assert result.same_batches
    assert [epoch for epoch, _ in result.alone[0].curve] == [2, 3]
    assert [epoch for epoch, _ in result.teacher.curve] == [2]
    teacher = make_teacher_job(tmp_path, settings)
    for folder in (Path(teacher.folder), tmp_path / "alone-s0", tmp_path / "fgd-s0"):
        assert list(folder.glob("events.out.tfevents.*")), folder
        assert (folder / "train.log").stat().st_size > 0
    assert (tmp_path / "report.md").is_file() and (tmp_path / "curves.png").is_file()
    assert Path(SETTINGS_FILE).read_bytes() == before

    weights = Path(teacher.folder) / "weights" / "last.pt"
    changed = os.stat(weights).st_mtime_ns
    again = quickstart(tmp_path, (0,), settings=settings, console=Console(quiet=True))
    assert os.stat(weights).st_mtime_ns == changed
    assert again.alone[0].map50_95 == result.alone[0].map50_95  # same seed, same student
    assert again.alone[0].batches == result.alone[0].batches
