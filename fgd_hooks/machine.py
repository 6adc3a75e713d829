"""What this machine computes with, for the record of a measurement."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    """The CPU's name, as far as the system tells it."""
    if CPUINFO.is_file():
        for line in CPUINFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """The name of what a training runs on.

    Args:
        device: as in Ultralytics: "cpu", a GPU's number or several with commas between, or another of torch's devices.
    """
    if device == "cpu":
        return processor()
    number = device.split(",")[0].rpartition(":")[2]
    return torch.cuda.get_device_name(int(number)) if number.isdigit() else device
