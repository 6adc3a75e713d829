"""What a run's process says of itself: its device, by name."""

import os
import platform

import pytest
import torch

from fgd_hooks.study import worker as machine
from fgd_hooks.utils.files import write_json


def test_the_processor_by_its_name(tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Some CPU: 3 GHz\nprocessor\t: 1\nmodel name\t: Other\n")
    monkeypatch.setattr(machine, "CPUINFO", file)
    assert machine.processor() == machine.device_name("cpu") == "Some CPU: 3 GHz"
    file.write_text("processor\t: 0\n")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert machine.processor() == "arm64", "a file without the line"
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr(platform, "processor", lambda: "Apple")
    assert machine.processor() == "Apple"


def test_a_gpu_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU {number}")
    assert [machine.device_name(each) for each in ("1", "1,0", "cuda:2", "mps")] == ["GPU 1", "GPU 1", "GPU 2", "mps"]


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job file, with a lease of this process; the training notes where and with what it is called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine.Lease, "end_without", lambda self: None)
    monkeypatch.setattr(machine, "train", lambda job, folder: seen.append((os.getcwd(), os.environ.get(GPUS))))
    seen: list[tuple[str, str | None]] = []
    folder = tmp_path / "run"
    folder.mkdir()
    write_json(folder / "job.json", {"machine": {"plugins": [], "variables": {GPUS: "2,3"}}})
    return folder / "job.json", seen


GPUS = "CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(("cluster", "visible"), [("local", "2,3"), ("slurm", "7")])
def test_a_job_sees_the_gpus_of_its_study_or_those_that_a_cluster_gives_it(job, monkeypatch, cluster, visible):
    file, seen = job
    monkeypatch.setenv(GPUS, "" if cluster == "local" else "7")  # as submitit leaves it
    machine.work(str(file), machine.Lease.take(file.parent, cluster).token)
    assert seen == [(str(file.parent), visible)]


def test_a_run_by_hand_takes_the_lease(job, monkeypatch):
    file, seen = job
    monkeypatch.setattr("sys.argv", ["worker", str(file)])
    lease = machine.Lease.take(file.parent)
    with pytest.raises(SystemExit, match="another process has it"):
        machine.main()
    lease.release()
    machine.main()
    assert len(seen) == 1
    assert machine.Lease.read(file.parent) is None
