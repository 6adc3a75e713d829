"""Run the trainings of a study side by side, each in a process of its own with one CPU thread."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fgd_hooks.study.plan import Run, read_result
from fgd_hooks.study.processes import log_tail, read_json, start_child, stop_child, write_json
from fgd_hooks.study.worker import JOB, job_of

TRAIN = (sys.executable, "-m", "fgd_hooks.study.worker")
LOCK, LOG, GUARD = "running.json", "train.log", ".lock"
_POLL_SECONDS = 0.5
_OTHERS_SECONDS = 10.0


class Runner:
    """Trains what is not finished; a failed run is reported and the others go on.

    Args:
        jobs: how many run at a time.
        devices: as in Ultralytics; given out in turn.
        deadline: value of ``time.monotonic()`` after which no run is started; None: no limit.
        command: the program, by default the training; it is given the path of the job's file.
        say: where lines about the progress go.
    """

    def __init__(
        self,
        jobs: int,
        devices: Sequence[str] = ("cpu",),
        deadline: float | None = None,
        command: Sequence[str] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.free = [devices[number % len(devices)] for number in range(jobs)]
        self.deadline, self.command, self.say = deadline, command or TRAIN, say
        self.failed: dict[str, str] = {}
        """Folder's name -> why, of the runs that failed or that lack one that failed."""
        self._running: list[_Running] = []

    def run(self, runs: Iterable[Run]) -> int:
        """Train those that are not finished; returns how many were left out because the time was over."""
        waiting = [run for run in runs if run.result() is None and run.name not in self.failed]
        try:
            while waiting or self._running:
                self._collect()
                waiting = self._without_hopeless(waiting)
                late = self.deadline is not None and time.monotonic() >= self.deadline
                started = None if late else self._start_one(waiting)
                if started is not None:
                    waiting.remove(started)
                elif late and not self._running:
                    return len(waiting)
                elif waiting or self._running:
                    time.sleep(_POLL_SECONDS if self._running else _OTHERS_SECONDS)
                    # what another process has finished meanwhile
                    waiting = [run for run in waiting if run.result() is None]
        finally:
            for child in self._running:
                child.stop()
            self._running.clear()
        return 0

    def _start_one(self, waiting: Sequence[Run]) -> Run | None:
        if not self.free:
            return None
        mine = {child.run.key for child in self._running}
        for run in waiting:
            if run.key not in mine and all(need.result() is not None for need in run.needs) and lock(run.folder):
                device = self.free.pop(0)
                self._running.append(_Running(run, device, self.command))
                self.say(f"{time.strftime('%H:%M:%S')} started  {run.folder.name} ({run.epochs} epochs, {device})")
                return run
        return None

    def _collect(self) -> None:
        for child in list(self._running):
            code = child.process.poll()
            if code is None:
                continue
            self._running.remove(child)
            self.free.append(child.device)
            child.stop()
            result = child.run.result()
            if code or result is None:
                tail = log_tail(child.folder / LOG)
                self.failed[child.run.name] = f"exit code {code}"
                self.say(f"FAILED {child.run.name} (exit code {code}). The end of {child.folder / LOG}:\n{tail}")
            else:
                value = result["results"]["val"]["map50_95"]
                self.say(
                    f"{time.strftime('%H:%M:%S')} finished {child.folder.name}: val mAP50-95 {100 * (value or 0):.1f}, "
                    f"{result['cpu_s']:.0f} CPU s"
                )

    def _without_hopeless(self, waiting: Sequence[Run]) -> list[Run]:
        left = []
        for run in waiting:
            lost = [need.name for need in run.needs if need.name in self.failed]
            if lost:
                self.failed[run.name] = f"it needs {lost[0]}, which failed"
                self.say(f"left out {run.name}: it needs {lost[0]}, which failed")
            else:
                left.append(run)
        return left


class _Running:
    """One training process. What an earlier, interrupted one left is removed: the run begins anew."""

    def __init__(self, run: Run, device: str, command: Sequence[str]) -> None:
        self.run, self.device, self.folder = run, device, run.folder
        for path in self.folder.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        write_json(self.folder / JOB, job_of(run, device))
        log = self.folder / LOG
        self.process: subprocess.Popen[bytes] = start_child([*command, str(self.folder / JOB)], self.folder, log, 1)

    def stop(self) -> None:
        """End the process, if it still runs, and give the folder free."""
        stop_child(self.process)
        (self.folder / LOCK).unlink(missing_ok=True)


def lock(folder: Path) -> bool:
    """Take a run's folder for this process; False where it is finished, or another living process has it."""
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / GUARD):  # two processes may find the same lock of a dead one
        if read_result(folder) is not None or in_progress(folder):
            return False
        write_json(folder / LOCK, {"pid": os.getpid(), "since": _since(os.getpid())})
    return True


def in_progress(folder: Path) -> bool:
    """Whether a living process has the run's folder."""
    try:
        owner = read_json(folder / LOCK)
        return bool(_since(int(owner["pid"])) == owner["since"])
    except (OSError, ValueError, KeyError):
        return False


def _since(pid: int) -> float:
    """When a process was started: a number that its successor with the same id does not share; -1: there is none."""
    import psutil  # type: ignore[import-untyped]

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return -1.0
