"""A study of fake trainings: YOLO files, small grey images, and a program that writes results instead of training."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml
from PIL import Image

from fgd_hooks.study.plan import Planner
from fgd_hooks.study.spec import load_study

FAKE = """
import json, sys, pathlib
file = pathlib.Path(sys.argv[1])
job = json.loads(file.read_text())
calls = file.parent.parent / "calls.txt"
with calls.open("a") as stream:
    stream.write(job["name"] + "\\n")
if job["settings"].get("warmup_epochs") == 13:
    print("unlucky")
    sys.exit(3)
(file.parent / "weights").mkdir(exist_ok=True)
(file.parent / "weights" / "last.pt").write_bytes(b"weights")
(file.parent / "results.csv").write_text("epoch,time\\n1,2\\n")
value = 0.3 + 0.01 * job["seed"] + 0.1 * (job["kind"] == "fgd")
found = {"map50_95": value, "per_class": [{"name": "a", "map50_95": value}]}
keep = {k: v for k, v in job.items() if k not in ("model", "data_yaml", "weights", "teacher", "start", "device")}
cpu = 20.0 if job["kind"] == "fgd" else 10.0
(file.parent / "result.json").write_text(json.dumps({**keep, "cpu_s": cpu, "wall_s": 1.0, "results": {"val": found}}))
"""


def make_data(folder: Path, train: int = 10, splits: tuple[str, ...] = ("train", "val", "test")) -> Path:
    """A data set in YOLO format of grey images with one box each."""
    for split in splits:
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(train if split == "train" else 3):
            Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / "images" / split / f"{split}{number}.png")
            (folder / "labels" / split / f"{split}{number}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump({**{split: f"images/{split}" for split in splits}, "names": {0: "a"}}))
    return file


def make_study(folder: Path, **changes: object) -> Path:
    """A study file of two arms and two seeds on one data set with a teacher of its own, beside its data."""
    if not (folder / "set").exists():
        make_data(folder / "set")
    content: dict[str, object] = {
        "name": "small",
        "epochs": 5,
        "seeds": [0, 1],
        "data": {"a": {"yaml": "set/data.yaml", "teacher": {"model": "yolo26s.yaml", "epochs": 2}}},
        "arms": {"alone": {"kind": "alone"}, "fgd": {"kind": "fgd"}},
        **changes,
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def planner(file: Path) -> Planner:
    """A planner whose runs lie beside the study file."""
    return Planner(load_study(file), file, file.parent / "runs")


def fake_command(folder: Path) -> tuple[str, str]:
    """The program that stands for a training; it notes each call in ``runs/calls.txt``."""
    file = folder / "fake.py"
    file.write_text(FAKE)
    return sys.executable, str(file)
