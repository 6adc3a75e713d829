"""A study of fake trainings (tests/helpers/fake_training.py): YOLO files and small grey images."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image

from fgd_hooks.study import runner
from fgd_hooks.study.lease import Lease
from fgd_hooks.study.plan import Planner, Run
from fgd_hooks.study.runner import JOB, Runner
from fgd_hooks.study.spec import load_study
from tests.helpers.fake_training import fake


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
    file.write_text(json.dumps(content, indent=1))  # which is YAML, without aliases
    return file


def planner(file: Path) -> Planner:
    """A planner whose runs lie beside the study file."""
    return Planner(load_study(file), file, file.parent / "runs")


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have studies do fake trainings, and those in this process, at once: for all that is not about processes."""

    def submit(self: Runner, lease: Lease, run: Run, device: str) -> Any:
        log, result = lease.folder / "log", lease.folder / "submitit_result"
        try:
            fake(str(lease.folder / JOB), lease.token)
        except RuntimeError as error:
            log.write_text(f"{type(error).__name__}: {error}\n")
        result.touch()
        return SimpleNamespace(done=lambda: True, paths=SimpleNamespace(stdout=log, result_pickle=result))

    monkeypatch.setattr(Runner, "_submit", submit)
    monkeypatch.setattr(runner, "_POLL_SECONDS", 0.01)


CLUSTER = {
    "sbatch": """
id=$(( $(cat $HERE/last 2>/dev/null || echo 100) + 1 )); echo $id > $HERE/last
cp "$1" $HERE/$id.sh
SLURM_JOB_ID=$id setsid bash $HERE/$id.sh > /dev/null 2>&1 < /dev/null &
echo $! > $HERE/$id.pid
echo "Submitted batch job $id"
""",
    "srun": """
output=${3//%j/$SLURM_JOB_ID}
shift 3
exec "$@" >> "${output//%t/0}" 2>&1
""",
    "sacct": """
echo "JobID|State|NodeList"
for id in "$@"; do
    [ -f $HERE/$id.pid ] || continue
    if kill -0 $(cat $HERE/$id.pid) 2>/dev/null; then echo "$id|RUNNING|node"; else echo "$id|COMPLETED|node"; fi
done
""",
    "scancel": """
kill -KILL -- -$(cat $HERE/$1.pid) 2>/dev/null
echo $1 >> $HERE/cancelled
""",
}


def make_cluster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SLURM's commands as scripts that run the jobs on this machine; what was submitted lies beside them."""
    folder.mkdir()
    for name, text in CLUSTER.items():
        (folder / name).write_text(f"#!/bin/bash\nHERE={folder}{text}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder
