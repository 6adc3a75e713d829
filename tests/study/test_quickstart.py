"""How the quickstart arranges its trainings: which teacher it uses again, what the arms differ in, how it fails."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("ultralytics")

from fgd_hooks.errors import QuickstartError
from fgd_hooks.study.data import Prepared
from fgd_hooks.study.plan import RESULT, Planner, Run
from fgd_hooks.study.quickstart import (
    STUDENT,
    QuickstartSettings,
    free_cores,
    quickstart,
    teacher_is_ready,
)
from fgd_hooks.study.scenes import SceneSettings
from fgd_hooks.study.worker import digest
from tests.helpers.studies import quick

SETTINGS = QuickstartSettings()
SMALL = QuickstartSettings(scenes=SceneSettings(train=4, val=2, size=64))


def runs(out: Path, settings: QuickstartSettings, seed: int = 0) -> dict[str, Run]:
    """The runs of a quickstart by their arms, on images that are not drawn."""
    planner = Planner(settings.study([seed]), out / "quickstart", out)
    scenes = dataclasses.replace(settings.scenes)
    planner.prepared = lambda name, whole=False: Prepared(Path("data.yaml"), repr(scenes), {})  # type: ignore
    return {run.arm: run for run in planner.plan().runs}


def finish(run: Run) -> None:
    """Put down what a finished training leaves."""
    import ultralytics

    run.weights.parent.mkdir(parents=True)
    run.weights.write_bytes(b"weights")
    result = {"versions": {"ultralytics": ultralytics.__version__}, "weights": digest(run.weights)}
    (run.folder / RESULT).write_text(json.dumps(result))


def test_a_finished_teacher_is_used_again(tmp_path: Path) -> None:
    teacher = runs(tmp_path, SETTINGS)["teacher"]
    assert not teacher_is_ready(teacher)
    finish(teacher)
    assert teacher_is_ready(teacher)
    assert teacher_is_ready(runs(tmp_path, dataclasses.replace(SETTINGS, student_epochs=3, val_every=1), 4)["teacher"])


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
    teacher = runs(tmp_path, SETTINGS)["teacher"]
    finish(teacher)
    other = runs(tmp_path, dataclasses.replace(SETTINGS, **change))["teacher"]
    assert other.folder != teacher.folder
    assert not teacher_is_ready(other)


def test_a_changed_model_yaml_of_the_same_name_is_another_teacher(tmp_path: Path) -> None:
    model = tmp_path / "teacher.yaml"
    model.write_text("width_multiple: 0.25")
    settings = dataclasses.replace(SETTINGS, teacher=str(model))
    finish(runs(tmp_path, settings)["teacher"])
    model.write_text("width_multiple: 0.5")
    assert not teacher_is_ready(runs(tmp_path, settings)["teacher"])


def test_an_unfinished_or_changed_teacher_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = runs(tmp_path, SETTINGS)["teacher"]
    finish(teacher)
    teacher.weights.write_bytes(b"other weights")
    assert not teacher_is_ready(teacher)
    teacher.weights.write_bytes(b"weights")
    assert teacher_is_ready(teacher)
    with monkeypatch.context() as patch:
        patch.setattr("ultralytics.__version__", "another")
        assert not teacher_is_ready(teacher)
    with monkeypatch.context() as patch:
        patch.setattr("fgd_hooks.study.plan.SETTINGS", {"weight_decay": 0.1})
        assert not teacher_is_ready(runs(tmp_path, SETTINGS)["teacher"])
    teacher.weights.unlink()
    assert not teacher_is_ready(teacher)
    (teacher.folder / RESULT).write_text("{")
    assert not teacher_is_ready(teacher)


def test_the_arms_differ_in_the_distillation_only(tmp_path: Path) -> None:
    found = runs(tmp_path, dataclasses.replace(SETTINGS, fgd={"weight": 2.0}), 3)
    fgd, alone = (found[arm].job(threads=2, device="cpu") for arm in ("fgd", "alone"))
    assert {key for key in fgd if fgd[key] != alone[key]} == {"key", "name", "arm", "kind", "fgd", "needs", "machine"}
    assert {key for key in fgd["machine"] if fgd["machine"][key] != alone["machine"].get(key)} == {"teacher", "weights"}
    assert fgd["machine"]["teacher"] == str(found["teacher"].folder / "weights" / "last.pt")
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


def test_a_failed_training_shows_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    monkeypatch.setattr("fgd_hooks.study.plan.SETTINGS", {"warmup_epochs": 13})
    with pytest.raises(QuickstartError, match=r"scenes-teacher-s0.*unlucky.*train\.log"):
        quickstart(tmp_path, settings=SMALL, console=Console(quiet=True))


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
        val_interval=2,
    )
    console = Console(width=120, force_terminal=False)
    with console.capture() as captured:
        result = quickstart(tmp_path, (0,), settings=settings, console=console)
    text = captured.get()
    assert "student + FGD" in text
    assert all(f"scenes {arm}, seed 0" in text for arm in ("teacher", "alone", "fgd"))  # a bar for each
    assert result.same_batches
    assert [epoch for epoch, _ in result.alone[0]["curve"]] == [2, 3]
    assert [epoch for epoch, _ in result.teacher["curve"]] == [2]
    for arm in ("teacher", "alone", "fgd"):
        (folder,) = tmp_path.glob(f"scenes-{arm}-s0-*")
        assert list(folder.glob("events.out.tfevents.*")), folder
        assert (folder / "train.log").stat().st_size > 0
    assert (tmp_path / "report.md").is_file() and (tmp_path / "curves.png").is_file()
    assert Path(SETTINGS_FILE).read_bytes() == before

    (weights,) = tmp_path.glob("scenes-teacher-s0-*/weights/last.pt")
    changed = os.stat(weights).st_mtime_ns
    (student,) = tmp_path.glob("scenes-alone-s0-*/weights/last.pt")
    trained = os.stat(student).st_mtime_ns
    again = quickstart(tmp_path, (0,), settings=settings, console=Console(quiet=True))
    assert os.stat(weights).st_mtime_ns == changed
    assert os.stat(student).st_mtime_ns != trained
    assert again.alone[0]["map50_95"] == result.alone[0]["map50_95"]  # same seed, same student
    assert again.alone[0]["batches"] == result.alone[0]["batches"]
