"""``fgd study``: listing, training, test once, collecting, tables; one slow test trains for real."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fgd_hooks.cli.main import main
from fgd_hooks.cli.study import _slots
from fgd_hooks.study import worker
from fgd_hooks.study.plan import TEST
from fgd_hooks.study.records import read_curves, read_runs
from tests.helpers.fake_training import fake
from tests.helpers.studies import make_cluster, make_data, make_study, planner, quick


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study whose trainings and test measurements are made up; in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    quick(monkeypatch)
    found = {"map50_95": 0.25, "per_class": [{"name": "a", "map50_95": 0.25}]}
    monkeypatch.setattr("fgd_hooks.study.worker.measure", lambda job, split: dict(found))
    return make_study(tmp_path)


def fgd(file: Path, *more: str) -> int:
    return main(["study", str(file), "--out", str(file.parent / "runs"), *more])


def test_dry_run_lists_and_trains_nothing(study, capsys):
    assert fgd(study, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(line.startswith("to do") for line in lines)
    assert not (study.parent / "runs" / "calls.txt").exists()
    fgd(study, "--seeds", "0", "--jobs", "1")
    capsys.readouterr()
    fgd(study, "--dry-run")
    states = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert (states.count("done"), states.count("to")) == (3, 2)


def test_a_reader_that_stops_early_is_no_error(study):
    command = [sys.executable, "-m", "fgd_hooks.cli.main", "study", str(study), "--dry-run", "--out", "runs"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_study_with_equal_compute_trains_to_its_end(study, capsys, monkeypatch):
    scanned = []
    monkeypatch.setattr("fgd_hooks.study.data.scan_labels", scanned.append)
    arms = {"alone": {"kind": "alone"}, "same": {"kind": "alone", "compute": "fgd"}, "fgd": {"kind": "fgd"}}
    file = make_study(study.parent, arms=arms)
    assert fgd(file, "--jobs", "2") == 0
    done = [run for run in planner(file).plan().runs if run.result()]
    assert sorted((run.arm, run.epochs) for run in done if run.arm == "same") == [("same", 10), ("same", 10)]
    assert len(scanned) == 1  # one data set, in two rounds


def test_labels_are_scanned_once_before_trainings_that_would_do_it_together(study):
    assert fgd(study, "--jobs", "2") == 0
    assert {path.name for path in (study.parent / "runs").glob("data/*/labels/*.cache")} == {"train.cache", "val.cache"}


def test_a_failed_run_gives_exit_code_1(study, capsys):
    arms = {"alone": {"kind": "alone", "train": {"warmup_epochs": 13}}, "same": {"kind": "alone", "compute": "alone"}}
    assert fgd(make_study(study.parent, arms=arms), "--jobs", "1") == 1
    assert "failed: a-alone-s0" in capsys.readouterr().out


def test_time_over(study, capsys):
    assert fgd(study, "--max-minutes", "0") == 0
    assert "5 runs are left" in capsys.readouterr().out


def test_unknown_names(study, capsys):
    assert fgd(study, "--only", "allone") == 2
    assert "There is no arm 'allone'" in capsys.readouterr().err
    assert fgd(study, "--data", "b") == 2
    assert "There is no data set 'b'" in capsys.readouterr().err


def test_test_is_measured_once_and_when_all_is_done(study, capsys):
    fgd(study, "--seeds", "0", "--jobs", "1")
    assert fgd(study, "--test") == 2
    assert "2 runs are not finished" in capsys.readouterr().err
    fgd(study, "--jobs", "1")
    assert fgd(study, "--test") == 0
    file = planner(study).run("a", "fgd", 0).folder / TEST
    content = json.loads(file.read_text())
    assert content["results"]["test"]["map50_95"] == 0.25 and content["measured"]
    file.write_text(json.dumps({**content, "results": {"test": {"map50_95": 0.9, "per_class": []}}}))
    capsys.readouterr()
    assert fgd(study, "--test") == 0
    assert capsys.readouterr().out.count("measured on test before; kept") == 5
    assert json.loads(file.read_text())["results"]["test"]["map50_95"] == 0.9


def test_collected_records_have_no_paths_and_make_the_table(study, capsys):
    assert fgd(study, "--collect", "kept") == 2
    assert "No run of small is finished" in capsys.readouterr().err
    fgd(study, "--jobs", "1")
    assert fgd(study, "--collect", "kept") == 0
    folder = study.parent / "kept" / "small"
    assert {path.name for path in folder.iterdir()} == {"study.json", "runs.jsonl", "curves.csv.gz"}
    names = {f"a-{run}" for run in ("alone-s0", "alone-s1", "fgd-s0", "fgd-s1", "teacher-s0")}
    assert (records(folder), set(read_curves(folder))) == (names, names)
    assert read_curves(folder)["a-fgd-s1"] == [{"epoch": "1", "time": "2"}]
    packed = gzip.decompress((folder / "curves.csv.gz").read_bytes()).decode()
    for text in ((folder / "study.json").read_text(), (folder / "runs.jsonl").read_text(), packed):
        assert str(study.parent) not in text
    kept = read_runs(folder)["a-fgd-s1"]
    assert (kept["arm"], kept["seed"], kept["epochs"], kept["settings"]["imgsz"]) == ("fgd", 1, 5, 192)
    assert "test" not in kept["results"]
    capsys.readouterr()
    assert main(["study", str(folder), "--table"]) == 0
    # fake figures: FGD is 10 points above alone with every seed, at twice the cost
    assert "| fgd | 5 | 0, 1 | 40.5 ± 0.7 | +10.0 | +10.0 .. +10.0 |" in capsys.readouterr().out
    assert (folder / "a-yolo26n-val.png").stat().st_size > 5000
    assert fgd(study, "--table", "kept") == 0


def test_a_changed_study_replaces_its_records(study):
    fgd(study, "--jobs", "1")
    fgd(study, "--collect", "kept")
    file = make_study(study.parent, epochs=6)
    fgd(file, "--jobs", "1")
    fgd(file, "--collect", "kept")
    assert read_runs(study.parent / "kept" / "small")["a-fgd-s0"]["epochs"] == 6


def records(folder: Path) -> set[str]:
    return set(read_runs(folder))


def test_collecting_in_parts_keeps_what_belongs_to_the_study(study):
    entry = {"yaml": "set/data.yaml", "teacher": {"model": "yolo26s.yaml", "epochs": 2}}
    file = make_study(study.parent, seeds=[0], data={"a": entry, "b": {**entry, "train": {"imgsz": 96}}})
    fgd(file, "--jobs", "2")
    folder = study.parent / "kept" / "small"
    fgd(file, "--collect", "kept", "--data", "a")
    fgd(file, "--collect", "kept", "--data", "b")
    assert records(folder) == {f"{data}-{arm}-s0" for data in "ab" for arm in ("alone", "fgd", "teacher")}
    images = {name: entry["images"] for name, entry in json.loads((folder / "study.json").read_text())["data"].items()}
    (study.parent / "set").rename(study.parent / "elsewhere")
    assert fgd(file, "--collect", "kept", "--data", "a") == 2  # it is not there any more
    assert records(folder) == {f"{data}-{arm}-s0" for data in "ab" for arm in ("alone", "fgd", "teacher")}
    assert images == {name: {"train": 10, "val": 3, "test": 3} for name in "ab"}


def test_a_set_that_is_not_at_hand_keeps_its_records(study):
    make_data(study.parent / "other")
    entry = {"yaml": "set/data.yaml", "teacher": {"model": "yolo26s.yaml", "epochs": 2}}
    file = make_study(study.parent, seeds=[0], data={"a": entry, "b": {**entry, "yaml": "other/data.yaml"}})
    fgd(file, "--jobs", "2")
    fgd(file, "--collect", "kept")
    folder = study.parent / "kept" / "small"
    before = (records(folder), json.loads((folder / "study.json").read_text()))
    (study.parent / "other").rename(study.parent / "gone")
    assert fgd(file, "--collect", "kept", "--data", "a") == 0
    assert (records(folder), json.loads((folder / "study.json").read_text())) == before


def test_records_of_an_earlier_study_are_removed(study, capsys):
    fgd(study, "--jobs", "1")
    fgd(study, "--collect", "kept")
    folder = study.parent / "kept" / "small"
    arms = {"alone": {"kind": "alone"}, "renamed": {"kind": "fgd"}}
    changed = make_study(study.parent, arms=arms, train={"imgsz": 96})
    fgd(changed, "--jobs", "1", "--seeds", "0")
    capsys.readouterr()
    fgd(changed, "--collect", "kept")
    # seed 1 of alone has the old size of images, and there is no arm fgd any more
    assert records(folder) == {"a-alone-s0", "a-renamed-s0", "a-teacher-s0"}
    assert set(read_curves(folder)) == records(folder)
    said = capsys.readouterr().out
    assert all(f"removed {name}:" in said for name in ("a-alone-s1", "a-fgd-s0", "a-fgd-s1"))


def test_a_shared_run_is_kept_under_this_study_s_names(study):
    fgd(study, "--jobs", "1")
    fgd(make_study(study.parent, student={"model": "yolo26n.yaml", "name": "mine"}), "--collect", "kept")
    folder = study.parent / "kept" / "small"
    assert read_runs(folder)["a-alone-s0"]["student"] == "mine"


def test_flags_together_are_done_in_their_order(study, capsys):
    fgd(study, "--jobs", "1")
    assert fgd(study, "--test", "--collect", "kept", "--table") == 0
    kept = read_runs(study.parent / "kept" / "small")["a-fgd-s0"]
    assert set(kept["results"]) == {"val", "test"} and kept["test_measured"]
    assert "## a, yolo26n: test" in (study.parent / "kept" / "small" / "tables.md").read_text()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--jobs", "0"), "--jobs is 0; expected 1 or more"),
        (("--device", "0,"), "--device is '0,'"),
        (("--seeds", "77"), "There is no seed 77 in"),
        (("--dry-run", "--collect", "kept"), "--dry-run goes alone"),
        (("--cluster", "slurm", "--device", "0,1"), "a job of a cluster has a GPU of its own"),
        (("--cluster", "slurm", "--slurm", "partition"), "--slurm: 'partition' cannot be read; expected key=value"),
    ],
)
def test_impossible_flags(study, capsys, flags, said):
    assert fgd(study, *flags) == 2
    assert said in capsys.readouterr().err
    assert not list(study.parent.glob("runs/a-*"))


@pytest.mark.parametrize(
    ("given", "jobs", "cluster", "slots"),
    [
        ("cpu", None, "local", len(os.sched_getaffinity(0))),
        ("0", None, "local", 1),
        ("0,1", None, "local", 2),
        ("0", 3, "local", 3),
        ("cpu", None, "slurm", 100),
    ],
)
def test_as_many_trainings_as_devices(given, jobs, cluster, slots):
    arguments = argparse.Namespace(device=given, jobs=jobs, cluster=cluster)
    assert _slots(arguments) == (given.split(","), slots)


@pytest.mark.parametrize("flags", [(), ("--cluster", "slurm", "--slurm", "partition=gpu", "time=60")])
def test_trainings_in_processes_of_their_own(tmp_path, monkeypatch, capsys, flags):
    cluster = make_cluster(tmp_path / "cluster", monkeypatch)
    monkeypatch.setattr(worker, "work", fake)
    assert fgd(make_study(tmp_path), "--jobs", "2", "--only", "alone", *flags) == 0
    assert capsys.readouterr().out.count("finished a-alone-s") == 2
    submitted = [file.read_text() for file in cluster.glob("*.sh")]
    assert len(submitted) == (2 if flags else 0)
    assert all("--partition=gpu" in text and "--time=60" in text for text in submitted)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"imgz": 320}}, "train.imgz is no setting of Ultralytics. Did you mean 'imgsz'"),
        ({"arms": {"alone": {"kind": "alone", "train": {"batch": "many"}}}}, "arms.alone.train: .*batch"),
        ({"student": {"model": "yolo99n.yaml"}}, "student.model: 'yolo99n.yaml' is neither a file nor"),
    ],
)
@pytest.mark.parametrize("flags", [("--dry-run",), ()])
def test_what_no_training_would_begin_with(study, capsys, changes, said, flags):
    assert fgd(make_study(study.parent, **changes), *flags) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (study.parent / "runs" / "calls.txt").exists()


def test_a_failed_run_does_not_keep_others_from_being_planned(study, capsys):
    entry = {"yaml": "set/data.yaml", "teacher": {"model": "yolo26s.yaml", "epochs": 2}}
    arms = {
        "alone": {"kind": "alone"},
        "bad": {"kind": "alone", "data": ["b"], "train": {"warmup_epochs": 13}},
        "fgd": {"kind": "fgd"},
        "same": {"kind": "alone", "compute": "fgd"},
    }
    file = make_study(study.parent, seeds=[0], arms=arms, data={"a": entry, "b": {**entry, "train": {"imgsz": 96}}})
    assert fgd(file, "--jobs", "2") == 1
    done = {(run.data, run.arm) for run in planner(file).plan().runs if run.result()}
    assert {("a", "same"), ("b", "same")} <= done
    assert "not planned yet" not in capsys.readouterr().out


@pytest.mark.slow
def test_real_trainings(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student = {"model": "yolo26n.yaml", "scale": [0.33, 0.0625, 1024], "name": "tiny"}
    content = {
        "name": "real",
        "plugins": [str(Path(__file__).parents[2] / "configs" / "studies" / "fgd_ablation.py")],
        "epochs": 1,
        "seeds": [0, 1],
        "train": {"imgsz": 64, "batch": 4, "nbs": 4},
        "student": {**student, "pretrain": {"data": "b", "epochs": 1}},
        "data": {
            "a": {
                "scenes": {"train": 12, "val": 4, "size": 64},
                "fraction": 0.5,
                "teacher": {"model": "yolo26n.yaml", "epochs": 1},
            },
            "b": {"scenes": {"train": 8, "val": 4, "size": 64, "seed": 5}, "compare": False},
        },
        "arms": {"alone": {"kind": "alone"}, "fgd": {"fgd": {"loss": {"name": "fgd_ablation"}}}},
    }
    file = tmp_path / "real.yaml"
    file.write_text(yaml.safe_dump(content))
    assert main(["study", str(file), "--out", "runs", "--jobs", "2"]) == 0
    assert main(["study", str(file), "--out", "runs", "--test"]) == 0
    assert main(["study", str(file), "--out", "runs", "--collect", "kept", "--table"]) == 0
    folder = tmp_path / "kept" / "real"
    records = read_runs(folder)
    assert set(records) == {"a-alone-s0", "a-alone-s1", "a-fgd-s0", "a-fgd-s1", "a-teacher-s0", "b-pretrain-s0"}
    for seed in (0, 1):
        alone, mine = records[f"a-alone-s{seed}"], records[f"a-fgd-s{seed}"]
        assert alone["batches"] == mine["batches"] != 0  # same images, same augmentation
        assert alone["images"]["train"] == 6
        assert mine["results"]["test"]["images"] == 4
        assert mine["cpu_s"] > 0
    assert records["a-alone-s0"]["batches"] != records["a-alone-s1"]["batches"]
    (row,) = read_curves(folder)["a-fgd-s0"]
    assert float(row["train/fgd_fg"]) > 0
    log = next((tmp_path / "runs").glob("a-alone-s0-*")) / "train.log"
    assert re.search(r"Transferred [1-9]\d*/", log.read_text())  # from the pretrained student
    capsys.readouterr()
    assert main(["study", str(file), "--out", "runs", "--jobs", "2"]) == 0
    assert "6 runs, 6 done before" in capsys.readouterr().out
