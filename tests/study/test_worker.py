"""What a run's process says of itself: its device, by name; and how it writes its files."""

import platform

import pytest
import torch

from fgd_hooks.study import worker as machine
from fgd_hooks.study.plan import read_json, write_json


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


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert read_json(file) == {"a": 1}
