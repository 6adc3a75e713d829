"""Trainings in processes of their own: start, stop and read the log of one; JSON files written in one piece."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).resolve().parents[1]  # the children find the package where this process found it


_TAIL_LINES = 15


_PARENT_SECONDS = 1.0


def start_child(
    command: Sequence[str], folder: Path, log: Path, threads: int, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a program in a folder, with its output in a file.

    Args:
        command: program and arguments.
        folder: its working directory.
        log: file for everything it prints.
        threads: CPU threads of its tensor operations.
        environment: variables to add to those of this process.
    """
    variables = {
        # Threads that wait for each other give their core away sooner: on idle cores this costs nothing, beside
        # other programs two threads were seven times faster with it.
        "GOMP_SPINCOUNT": "10000",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        **(environment or {}),
    }
    with log.open("wb") as output:
        return subprocess.Popen(
            list(command),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=variables,
            cwd=folder,
        )


def stop_child(process: subprocess.Popen[bytes]) -> None:
    """End a process, if it still runs."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def end_with_parent() -> None:
    """Let this process end soon after the one that started it, even where that one is killed outright."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def log_tail(file: Path) -> str:
    """The last lines of a log; of a line that a progress bar rewrote, its last state."""
    lines = [line.split("\r")[-1].rstrip() for line in file.read_text(errors="replace").split("\n")]
    return "\n".join("  " + line for line in [line for line in lines if line][-_TAIL_LINES:])


def write_json(file: Path, content: object) -> None:
    """Write a JSON file in one piece: a reader sees the old or the new content, never half of it."""
    temporary = file.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, indent=1) + "\n")
        stream.flush()
        os.fsync(stream.fileno())  # the new name must not survive a loss of power without its content
    os.replace(temporary, file)


def read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object."""
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


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
