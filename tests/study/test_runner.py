"""Running a study with fake trainings: what is skipped, begun anew, failed, left for later, and ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fgd_hooks.errors import StudyError
from fgd_hooks.study import worker
from fgd_hooks.study.lease import LEASE, _host
from fgd_hooks.study.plan import RESULT
from fgd_hooks.study.runner import Runner, log_tail
from tests.helpers.fake_training import fake, report
from tests.helpers.studies import make_cluster, make_study, planner, quick


@pytest.fixture
def real(monkeypatch):
    """Fake trainings in processes of their own, as submitit starts them."""
    monkeypatch.setattr(worker, "work", fake)


@pytest.fixture(autouse=True)
def at_once(request, monkeypatch):
    if "real" not in request.fixturenames:
        quick(monkeypatch)


def go(file: Path, **options) -> tuple[Runner, list[str], int]:
    """Run a study; returns the runner, the names of the trainings that were started, and how many were left."""
    calls = file.parent / "runs" / "calls.txt"
    calls.unlink(missing_ok=True)
    chosen = {key: options.pop(key) for key in ("only", "data", "seeds") if key in options}
    runner = Runner(say=lambda text: None, **{"jobs": 2, **options})
    left = runner.run(planner(file).plan(**chosen).runs)
    return runner, calls.read_text().split() if calls.exists() else [], left


def short(names: list[str]) -> list[str]:
    return sorted(name.rsplit("-", 1)[0] for name in names)


DEAD = {"token": "t", "pid": os.getpid(), "since": 1.0, "cluster": "local"}  # not this process's start
ALL = ["a-alone-s0", "a-alone-s1", "a-fgd-s0", "a-fgd-s1", "a-teacher-s0"]


def test_all_runs_once_and_the_teacher_first(tmp_path, real):
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
    (run.folder / LEASE).write_text(json.dumps({**DEAD, "host": _host()}))
    assert "a-alone-s0" in short(go(file)[1])
    assert not (run.folder / "weights" / "best.pt").exists()
    assert not (run.folder / LEASE).exists()


def test_a_failed_run_is_reported_and_the_others_go_on(tmp_path, real):
    arms = {"bad": {"kind": "alone", "train": {"warmup_epochs": 13}}, "alone": {"kind": "alone"}}
    said: list[str] = []
    file = make_study(tmp_path, arms=arms)
    runner = Runner(jobs=1, say=said.append)
    runner.run(planner(file).plan().runs)
    assert short(list(runner.failed)) == ["a-bad-s0", "a-bad-s1"]
    assert set(runner.failed.values()) == {"RuntimeError: unlucky"}
    (text, _) = [text for text in said if "FAILED" in text]
    assert "train.log" in text and "  100% of an epoch" in text and "RuntimeError: unlucky" in text
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
    Runner(2, ("0", "1"), say=said.append).run(planner(file).plan(only=["alone"]).runs)
    started = [text for text in said if "started" in text]
    assert ["0)" in started[0], "1)" in started[1]] == [True, True]


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


def test_the_log_of_a_failed_run_is_shown_without_the_states_of_its_progress_bars(tmp_path):
    file = tmp_path / "log"
    file.write_text("".join(f"line {n}\n" for n in range(30)) + "10 %\r20 %\r30 %\n\nthe end\n")
    lines = log_tail(file)
    assert (lines[-2:], len(lines)) == (["30 %", "the end"], 25)
    assert log_tail(tmp_path / "none") == []


def test_a_run_that_is_killed_is_told_from_one_that_fails(tmp_path, real):
    file = make_study(tmp_path, arms={"alone": {"kind": "alone", "train": {"warmup_epochs": 14}}})
    runner, _, _ = go(file, only=["alone"], seeds=[0])
    assert list(runner.failed.values()) == ["it was killed, perhaps for want of memory"]


@pytest.mark.slow
def test_what_a_failure_raises_ends_the_others(tmp_path, real):
    arms = {"endless": {"kind": "alone", "train": {"warmup_epochs": 15}}, "bad": {"kind": "alone"}}
    arms["bad"]["train"] = {"warmup_epochs": 13}
    runs = planner(make_study(tmp_path, arms=arms, baseline="bad")).plan(["endless", "bad"], seeds=[0]).runs

    def give_up(text):
        raise StudyError(text)

    with pytest.raises(StudyError, match="a-bad-s0.*unlucky"):
        Runner(2, say=lambda text: None, fail=give_up).run(runs)
    assert (tmp_path / "runs" / "up").exists()
    assert not any((run.folder / LEASE).exists() for run in runs)
    assert not [each for each in psutil.Process().children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE]


def test_a_job_has_its_threads_and_the_gpus_of_its_study(tmp_path, monkeypatch, real):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setattr(worker, "work", report)
    (run,) = planner(make_study(tmp_path)).plan(["alone"], seeds=[0]).runs
    Runner(1, ("1",), threads=3, say=lambda text: None).run([run])
    seen = run.result()
    assert (seen["OMP_NUM_THREADS"], seen["MKL_NUM_THREADS"]) == ("3", "3")
    assert os.environ.get("OMP_NUM_THREADS") != "3"  # this process has what it had
    job = json.loads((run.folder / "job.json").read_text())["machine"]
    assert (job["device"], job["variables"]) == ("1", {"CUDA_VISIBLE_DEVICES": "2,3"})


@pytest.mark.skipif(sys.platform == "win32", reason="processes end another way")
@pytest.mark.parametrize(
    "how",
    [signal.SIGTERM, *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGKILL, signal.SIGINT))],
)
def test_a_study_that_is_ended_leaves_no_training_behind(tmp_path, how, real):
    parent = tmp_path / "parent.py"
    parent.write_text(
        "import signal, sys\nfrom pathlib import Path\nfrom fgd_hooks.cli.study import end_on_terminate\n"
        "from fgd_hooks.study import worker\nfrom fgd_hooks.study.runner import Runner\n"
        "from tests.helpers.fake_training import endless\nfrom tests.helpers.studies import planner\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\nend_on_terminate()\nworker.work = endless\n"
        f"Runner(1).run(planner(Path({str(make_study(tmp_path))!r})).plan().runs)\n"
    )
    root = Path(__file__).parents[2]
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(parent)],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            start_new_session=True,
            stderr=errors,
        )
    deadline = time.monotonic() + 120
    while not (tmp_path / "runs" / "up").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 2
    if how == signal.SIGINT:  # Ctrl-C reaches all processes of the terminal
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    process.wait(timeout=60)
    assert psutil.wait_procs(children, timeout=60)[1] == []
    assert (tmp_path / "errors").read_text().count("Traceback") == (how == signal.SIGINT)  # the study's own alone


@pytest.fixture
def cluster(tmp_path, monkeypatch, real):
    monkeypatch.setattr("fgd_hooks.study.runner._LATE_SECONDS", 0.5)
    return make_cluster(tmp_path / "cluster", monkeypatch)


def test_the_same_call_runs_a_study_on_a_cluster(tmp_path, cluster):
    bad = {"kind": "alone", "train": {"warmup_epochs": 13}}
    file = make_study(tmp_path, seeds=[0], arms={"alone": {"kind": "alone"}, "bad": bad})
    settings = {"partition": "gpu", "time": 60}
    runner, calls, left = go(file, cluster="slurm", slurm=settings, devices=("0",), threads=2, only=["alone", "bad"])
    assert (short(calls), left) == (["a-alone-s0", "a-bad-s0"], 0)
    assert planner(file).run("a", "alone", 0).result() is not None
    assert list(runner.failed.values()) == ["RuntimeError: unlucky"]
    asked = (cluster / "101.sh").read_text()
    for text in ("--partition=gpu", "--time=60", "--cpus-per-task=2", "--gpus-per-node=1", "--job-name=a-alone-s0-"):
        assert f"#SBATCH {text}" in asked


def test_ending_a_study_cancels_its_jobs(tmp_path, cluster):
    arms = {"endless": {"kind": "alone", "train": {"warmup_epochs": 15}}, "bad": {"kind": "alone"}}
    arms["bad"]["train"] = {"warmup_epochs": 13}

    def give_up(text):
        raise KeyboardInterrupt

    runs = planner(make_study(tmp_path, arms=arms, baseline="bad")).plan(["endless", "bad"], seeds=[0]).runs
    with pytest.raises(KeyboardInterrupt):
        Runner(2, cluster="slurm", say=lambda text: None, fail=give_up).run(runs)
    assert (cluster / "cancelled").read_text() == "101\n"
    assert not any((run.folder / LEASE).exists() for run in runs)


def test_what_a_cluster_does_not_take_is_said(tmp_path, cluster, monkeypatch):
    file = make_study(tmp_path)
    with pytest.raises(StudyError, match="partion.*partition"):
        go(file, cluster="slurm", slurm={"partion": "gpu"})
    (cluster / "sbatch").write_text("#!/bin/bash\necho 'invalid partition' >&2\nexit 1\n")
    with pytest.raises(StudyError, match="invalid partition"):
        go(file, cluster="slurm")
    monkeypatch.setenv("PATH", os.pathsep.join(os.environ["PATH"].split(os.pathsep)[1:]))
    with pytest.raises(StudyError, match="are you indeed on a slurm cluster"):
        go(file, cluster="slurm")
    assert not list((tmp_path / "runs").glob(f"*/{LEASE}"))
