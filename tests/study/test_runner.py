"""Running a study with fake trainings: what is skipped, begun anew, failed, left for later, and ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from fgd_hooks.errors import StudyError
from fgd_hooks.study.plan import RESULT
from fgd_hooks.study.runner import LOCK, Runner, in_progress, lock
from tests.helpers.studies import fake_command, make_study, planner


def go(file: Path, **options) -> tuple[Runner, list[str], int]:
    """Run a study; returns the runner, the names of the trainings that were started, and how many were left."""
    calls = file.parent / "runs" / "calls.txt"
    calls.unlink(missing_ok=True)
    chosen = {key: options.pop(key) for key in ("only", "data", "seeds") if key in options}
    runner = Runner(command=fake_command(file.parent), say=lambda text: None, **{"jobs": 2, **options})
    left = runner.run(planner(file).plan(**chosen).runs)
    return runner, calls.read_text().split() if calls.exists() else [], left


def short(names: list[str]) -> list[str]:
    return sorted(name.rsplit("-", 1)[0] for name in names)


ALL = ["a-alone-s0", "a-alone-s1", "a-fgd-s0", "a-fgd-s1", "a-teacher-s0"]


def test_all_runs_once_and_the_teacher_first(tmp_path):
    file = make_study(tmp_path)
    runner, calls, left = go(file)
    assert (short(calls), left, runner.failed) == (ALL, 0, {})
    order = [name.rsplit("-", 1)[0] for name in calls]
    assert order.index("a-teacher-s0") < order.index("a-fgd-s0")
    assert go(file)[1] == []


def test_changed_settings_are_new_runs_and_the_old_ones_stay(tmp_path):
    go(make_study(tmp_path))
    again = make_study(tmp_path, arms={"alone": {"kind": "alone"}, "fgd": {"fgd": {"balance": {"ratio": 2}}}})
    assert short(go(again)[1]) == ["a-fgd-s0", "a-fgd-s1"]
    assert go(make_study(tmp_path))[1] == []
    assert short(go(make_study(tmp_path, train={"lr0": 0.1}))[1]) == ALL
    assert len(go(make_study(tmp_path, epochs=6))[1]) == 4  # the teacher's epochs are its own


def test_the_same_run_under_another_name_is_not_run_again(tmp_path):
    go(make_study(tmp_path))
    renamed = {"plain": {"kind": "alone"}, "alone": {"kind": "alone"}, "default": {"kind": "fgd"}}
    file = make_study(tmp_path, name="other", arms=renamed)
    assert go(file)[1] == []
    run = planner(file).run("a", "plain", 1)
    assert run.name.startswith("a-plain-s1-") and run.folder.name.startswith("a-alone-s1-")


def test_an_interrupted_run_begins_anew(tmp_path):
    file = make_study(tmp_path)
    run = planner(file).run("a", "alone", 0)
    (run.folder / "weights").mkdir(parents=True)
    (run.folder / "weights" / "best.pt").write_bytes(b"half")
    (run.folder / LOCK).write_text(json.dumps({"pid": os.getpid(), "since": 1.0}))  # not this process's start
    assert "a-alone-s0" in short(go(file)[1])
    assert not (run.folder / "weights" / "best.pt").exists()
    assert not (run.folder / LOCK).exists()


def test_a_failed_run_is_reported_and_the_others_go_on(tmp_path):
    arms = {"bad": {"kind": "alone", "train": {"warmup_epochs": 13}}, "alone": {"kind": "alone"}}
    said: list[str] = []
    file = make_study(tmp_path, arms=arms)
    runner = Runner(jobs=1, command=fake_command(tmp_path), say=said.append)
    runner.run(planner(file).plan().runs)
    assert short(list(runner.failed)) == ["a-bad-s0", "a-bad-s1"]
    assert "exit code 3" in next(iter(runner.failed.values()))
    assert any("FAILED" in text and "unlucky" in text for text in said)
    assert planner(file).run("a", "alone", 1).result() is not None
    assert short(go(file)[1]) == ["a-bad-s0", "a-bad-s1"]  # tried again


def test_what_needs_a_failed_run_is_left_out(tmp_path):
    data = {"a": {"yaml": "set/data.yaml", "teacher": {"model": "yolo26s.yaml", "train": {"warmup_epochs": 13}}}}
    runner, calls, _ = go(make_study(tmp_path, data=data))
    assert short(calls) == ["a-alone-s0", "a-alone-s1", "a-teacher-s0"]
    assert short(list(runner.failed)) == ["a-fgd-s0", "a-fgd-s1", "a-teacher-s0"]


def test_nothing_is_started_after_the_deadline(tmp_path):
    _, calls, left = go(make_study(tmp_path), deadline=time.monotonic())
    assert (calls, left) == ([], 5)


def test_some_arms_and_seeds(tmp_path):
    file = make_study(tmp_path)
    assert short(go(file, only=["alone"], seeds=[1, 7])[1]) == ["a-alone-s1", "a-alone-s7"]
    assert short(go(file, only=["fgd"], seeds=[0])[1]) == ["a-fgd-s0", "a-teacher-s0"]


def test_devices_are_given_out_in_turn(tmp_path):
    file = make_study(tmp_path, arms={"alone": {"kind": "alone"}})
    said: list[str] = []
    Runner(2, ("0", "1"), command=fake_command(tmp_path), say=said.append).run(planner(file).plan(only=["alone"]).runs)
    started = [text for text in said if "started" in text]
    assert ["0)" in started[0], "1)" in started[1]] == [True, True]


def test_a_run_of_a_living_process_is_left_to_it(tmp_path):
    run = planner(make_study(tmp_path)).run("a", "alone", 0)
    assert lock(run.folder)
    assert in_progress(run.folder)
    assert not lock(run.folder)
    (run.folder / LOCK).write_text(json.dumps({"pid": os.getpid(), "since": 1.0}))
    assert not in_progress(run.folder)
    assert lock(run.folder)


def test_of_many_that_find_a_dead_lock_one_takes_it(tmp_path):
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / LOCK).write_text(json.dumps({"pid": os.getpid(), "since": 1.0}))
        barrier = threading.Barrier(8)

        def take(folder: Path = folder, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return lock(folder)

        with ThreadPoolExecutor(8) as pool:
            taken = [future.result() for future in [pool.submit(take) for _ in range(8)]]
        assert taken.count(True) == 1


def test_a_damaged_result_is_said_and_made_anew(tmp_path, caplog):
    file = make_study(tmp_path)
    go(file)
    run = planner(file).run("a", "alone", 0)
    (run.folder / RESULT).write_text('{"results": {"val"')
    assert short(go(file)[1]) == ["a-alone-s0"]
    assert "result.json is damaged" in caplog.text
    assert planner(file).run("a", "alone", 0).result() is not None


def test_written_out_defaults_are_the_same_run(tmp_path):
    plain = planner(make_study(tmp_path)).run("a", "fgd", 0)
    arms = {"alone": {"kind": "alone"}, "fgd": {"fgd": {"inherit": "auto", "balance.ratio": 1.0}}}
    assert planner(make_study(tmp_path, arms=arms)).run("a", "fgd", 0).key == plain.key
    arms["fgd"]["fgd"]["balance.ratio"] = 2.0
    assert planner(make_study(tmp_path, arms=arms)).run("a", "fgd", 0).key != plain.key


def test_equal_compute_follows_from_the_least_disturbed_runs(tmp_path):
    arms = {"alone": {"kind": "alone"}, "same": {"kind": "alone", "compute": "fgd"}, "fgd": {"kind": "fgd"}}
    file = make_study(tmp_path, arms=arms)
    go(file)
    slow = planner(file).run("a", "fgd", 1).folder / RESULT  # other programs took its core
    slow.write_text(json.dumps({**json.loads(slow.read_text()), "cpu_s": 40.0}))
    assert planner(file).epochs("a", planner(file).spec.arms["same"]) == 10
    zero = planner(file).run("a", "alone", 1).folder / RESULT
    zero.write_text(json.dumps({**json.loads(zero.read_text()), "cpu_s": 0.0}))
    with pytest.raises(StudyError, match="took no CPU time"):
        planner(file).plan()


def test_equal_compute_compares_seconds_of_one_processor(tmp_path):
    arms = {"alone": {"kind": "alone"}, "same": {"kind": "alone", "compute": "fgd"}, "fgd": {"kind": "fgd"}}
    file = make_study(tmp_path, arms=arms)
    go(file)

    def note(arm, seed, **changes):
        result = planner(file).run("a", arm, seed).folder / RESULT
        result.write_text(json.dumps({**json.loads(result.read_text()), **changes}))

    for arm, seconds in (("alone", 1.0), ("fgd", 3.0)):
        note(arm, 0, device="quick", cpu_s=seconds)
        note(arm, 1, device=f"slow, for {arm}", cpu_s=0.1)
    assert planner(file).epochs("a", planner(file).spec.arms["same"]) == 15
    note("alone", 0, device="another")
    with pytest.raises(StudyError, match="fgd ran on quick, slow, for fgd, alone on another, slow, for alone; "):
        planner(file).plan()


def test_epochs_of_equal_compute_follow_from_the_finished_runs(tmp_path):
    arms = {"alone": {"kind": "alone"}, "same": {"kind": "alone", "compute": "fgd"}, "fgd": {"kind": "fgd"}}
    file = make_study(tmp_path, arms=arms)
    before = planner(file).plan(only=["same"], seeds=[0])
    assert len(before.waiting) == 1 and "same" in before.waiting[0]
    go(file)
    after = planner(file).plan(only=["same"], seeds=[0])
    assert [(run.arm, run.epochs) for run in after.runs] == [("same", 10)]  # fgd takes 20 seconds, alone 10


def test_as_many_steps_with_fewer_images(tmp_path):
    teacher = {"model": "yolo26s.yaml", "epochs": 2}
    entry = {"yaml": "set/data.yaml", "teacher": teacher}
    data = {"all": entry, "same": {**entry, "fraction": 0.5}, "steps": {**entry, "fraction": 0.5, "keep_steps": True}}
    plan = planner(make_study(tmp_path, data=data))
    runs = {name: plan.run(name, "fgd", 0) for name in data}
    assert [run.epochs for run in runs.values()] == [5, 5, 10]
    assert [run.prepared.counts["train"] for run in runs.values()] == [10, 5, 5]
    assert len({run.teacher.key for run in runs.values()}) == 1  # one teacher, which saw all images
    assert runs["all"].teacher.prepared.counts["train"] == 10


def test_given_teacher_weights_are_measured_and_not_trained(tmp_path):
    (tmp_path / "t.pt").write_bytes(b"one")
    data = {"a": {"yaml": "set/data.yaml", "teacher": {"weights": "t.pt", "model": "yolo26s.yaml"}}}
    file = make_study(tmp_path, data=data)
    run = planner(file).run("a", "fgd", 0)
    assert (run.teacher.epochs, run.teacher.weights) == (0, tmp_path / "t.pt")
    (tmp_path / "t.pt").write_bytes(b"two")
    assert planner(file).run("a", "fgd", 0).key != run.key
    (tmp_path / "t.pt").unlink()
    assert planner(file).run("a", "fgd", 0).teacher.epochs == 25


def test_a_teacher_may_have_another_width_than_its_yaml(tmp_path):
    scale = [0.5, 0.125, 1024]
    teacher = {"model": "yolo26n.yaml", "scale": scale, "epochs": 5}
    data = {"a": {"yaml": "set/data.yaml", "teacher": teacher}}
    narrow = planner(make_study(tmp_path, data=data, student={"model": "yolo26n.yaml", "scale": scale}))
    run = narrow.run("a", "fgd", 0)
    assert run.teacher.scale == tuple(scale)
    assert run.teacher.key == narrow.run("a", "alone", 0).key  # the same training as the student alone, made once
    (tmp_path / "t.pt").write_bytes(b"weights")
    given = {"a": {"yaml": "set/data.yaml", "teacher": {**teacher, "weights": "t.pt"}}}
    assert planner(make_study(tmp_path, data=given)).run("a", "fgd", 0).teacher.scale is None  # as in its file


def test_a_pretrained_student_starts_from_the_other_set(tmp_path):
    entry = {"yaml": "set/data.yaml", "teacher": {"model": "yolo26s.yaml", "epochs": 2}}
    data = {"a": entry, "b": {**entry, "compare": False, "train": {"imgsz": 96}}}
    file = make_study(tmp_path, data=data, student={"pretrain": {"data": "b", "epochs": 3, "seed": 4}})
    runs = planner(file).plan(seeds=[0]).runs
    assert [(run.data, run.arm, run.epochs) for run in runs[:2]] == [("b", "pretrain", 3), ("a", "alone", 5)]
    assert runs[1].start.settings["imgsz"] == 96
    assert {run.data for run in runs if run.arm != "pretrain"} == {"a"}


@pytest.mark.skipif(sys.platform == "win32", reason="processes end another way")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_study_leaves_no_training_behind(tmp_path, how):
    child = tmp_path / "child.py"
    child.write_text(
        "import pathlib, time\nfrom fgd_hooks.study.processes import end_with_parent\nend_with_parent()\n"
        f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\ntime.sleep(300)\n"
    )
    parent = tmp_path / "parent.py"
    parent.write_text(
        "import signal, sys\nfrom pathlib import Path\nfrom fgd_hooks.cli.study import end_on_terminate\n"
        "from fgd_hooks.study.runner import Runner\nfrom tests.helpers.studies import planner\nend_on_terminate()\n"
        f"Runner(1, command=(sys.executable, {str(child)!r})).run("
        f"planner(Path({str(make_study(tmp_path))!r})).plan().runs)\n"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, str(parent)], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    deadline = time.monotonic() + 120
    while not (tmp_path / "up").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(how)
    process.wait(timeout=60)
    assert psutil.wait_procs(children, timeout=60)[1] == []
