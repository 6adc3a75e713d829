"""Run the quickstart's trainings in processes of their own and show how far they are."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fgd_hooks.study.processes import log_tail, read_json, start_child, stop_child, write_json
from fgd_hooks.study.quickstart_train import Job

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
from fgd_hooks.errors import QuickstartError

TRAIN = (sys.executable, "-m", "fgd_hooks.study.quickstart_train")


_POLL_SECONDS = 0.25


def run_jobs(jobs: Sequence[Job], progress: Progress, command: Sequence[str] = TRAIN) -> None:
    """Train each job in a process of its own, two at a time.

    Args:
        jobs: what to train.
        progress: display that gets a line for each.
        command: the program; it is given the path of the job's file.

    Raises:
        QuickstartError: a training failed; the other one is stopped.
    """
    waiting = list(jobs)
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < 2:
                running.append(_Running(waiting.pop(0), progress, command))
            time.sleep(_POLL_SECONDS)
            running = [process for process in running if not process.finished()]
    finally:
        for process in running:
            process.stop()


class _Running:
    """One training process and its line in the progress display."""

    def __init__(self, job: Job, progress: Progress, command: Sequence[str]) -> None:
        self.job = job
        self.progress = progress
        folder = Path(job.folder)
        # What an earlier run left here would be taken for this one's, or mixed with it. The job file marks a folder as
        # the quickstart's own.
        if (folder / "job.json").is_file():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "job.json", job.to_dict())
        self.log = folder / "train.log"
        self.process = start_child([*command, str(folder / "job.json")], folder, self.log, job.threads)
        self.line = progress.add_task(job.title, total=job.epochs, note="starting")

    def finished(self) -> bool:
        """Update the display; True when the process has ended well.

        Raises:
            QuickstartError: it has ended with an error.
        """
        code = self.process.poll()
        if code is None:
            self._show()
            return False
        if code or not (Path(self.job.folder) / "summary.json").is_file():
            raise QuickstartError(
                f"the training '{self.job.name}' failed (exit code {code}). "
                f"The end of {self.log}:\n{log_tail(self.log)}"
            )
        total = self.job.epochs
        self.progress.update(self.line, completed=float(total), note=f"epoch {total}/{total}")
        return True

    def stop(self) -> None:
        """End the process, if it still runs."""
        stop_child(self.process)

    def _show(self) -> None:
        """Read the child's progress; a file that is not there yet leaves the display as it is."""
        try:
            done = float(read_json(Path(self.job.folder) / "progress.json")["epochs"])
        except (OSError, ValueError):
            return
        epoch = min(int(done) + 1, self.job.epochs)
        note = "measuring" if done >= self.job.epochs else f"epoch {epoch}/{self.job.epochs}"
        self.progress.update(self.line, completed=done, note=note)


@contextmanager
def progress_display(console: Console) -> Iterator[Progress]:
    """The progress display: stage, bar, where in it, time spent and time left."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:>18}"),
        BarColumn(),
        TextColumn("{task.fields[note]:<20}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=120) as progress:
        yield progress
