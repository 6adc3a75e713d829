"""Trainings that are none, for the engine of studies: they import next to nothing, as each runs in its own process."""

import json
import os
import signal
import time
from pathlib import Path


def fake(file: str, token: str) -> None:
    """Write results instead of training, and a line into ``calls.txt`` beside the runs' folders."""
    job, folder = json.loads(Path(file).read_text()), Path(file).parent
    with (folder.parent / "calls.txt").open("a") as stream:
        stream.write(job["name"] + "\n")
    trouble = job["settings"].get("warmup_epochs")
    if trouble == 13:
        while list(folder.parent.glob("*endless*")) and not (folder.parent / "up").exists():
            time.sleep(0.02)
        print("first words", "\n" * 40, "0%\r100% of an epoch", flush=True)
        raise RuntimeError("unlucky")
    if trouble == 14:
        os.kill(os.getpid(), signal.SIGKILL)
    if trouble == 15:
        endless(file, token)
    (folder / "weights").mkdir(exist_ok=True)
    (folder / "weights" / "last.pt").write_bytes(b"weights")
    (folder / "results.csv").write_text("epoch,time\n1,2\n")
    value = 0.3 + 0.01 * job["seed"] + 0.1 * (job["kind"] == "fgd")
    found = {"map50_95": value, "per_class": [{"name": "a", "map50_95": value}]}
    kept = {key: value for key, value in job.items() if key != "machine"}
    result = {**kept, "cpu_s": 20.0 if job["kind"] == "fgd" else 10.0, "wall_s": 1.0, "results": {"val": found}}
    (folder / "result.json").write_text(json.dumps(result))


def endless(file: str, token: str) -> None:
    """What a real training does at its beginning; then it does not end by itself."""
    from fgd_hooks.study.lease import Lease

    lease = Lease.read(Path(file).parent)
    assert lease is not None
    lease.end_without()
    (Path(file).parent.parent / "up").touch()
    time.sleep(300)


def report(file: str, token: str) -> None:
    """Tell the variables of the process as the run's result."""
    found = {"map50_95": 0.5, "per_class": []}
    (Path(file).parent / "result.json").write_text(json.dumps({**os.environ, "cpu_s": 1.0, "results": {"val": found}}))
