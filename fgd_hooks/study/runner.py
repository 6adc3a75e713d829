"""Run the trainings of a study side by side, through submitit: on this machine or on a SLURM cluster."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgd_hooks.errors import StudyError, needs_extra
from fgd_hooks.study import worker
from fgd_hooks.study.lease import LEASE, Lease
from fgd_hooks.study.plan import Run
from fgd_hooks.utils.files import read_json, write_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

JOB, LOG = "job.json", "train.log"
_ROOT = Path(__file__).resolve().parents[2]  # the jobs find the package where this process found it
_POLL_SECONDS, _OTHERS_SECONDS = 0.5, 10.0
_END_SECONDS = 10.0
_LATE_SECONDS = 60.0  # so much later another machine may see a new file in a shared folder
_DAY, _YEAR = 24 * 60, 365 * 24 * 60  # minutes
_TAIL_LINES = 25  # the frames of submitit are among them


@dataclass
class Started:
    """A run that is under way."""

    run: Run
    lease: Lease
    device: str
    job: Any  # submitit's
    bar: TaskID
    ended: float | None = None  # when the job was first seen to be over


@dataclass
class Runner:
    """Trains what is not finished; a failed run is reported and the others go on."""

    jobs: int  # how many run at a time
    devices: Sequence[str] = ("cpu",)  # as in Ultralytics; given out in turn
    threads: int = 1  # of the CPU, for each run
    cluster: str = "local"  # or "slurm"
    slurm: Mapping[str, Any] = field(default_factory=dict)  # of its jobs, by submitit's names: partition, time, ...
    deadline: float | None = None  # value of time.monotonic() after which no run is started; None: no limit
    val_every: int = 0  # validate every so many epochs, for curves; 0: after the last one alone
    progress: Progress | None = None  # the display, which gets a bar for each run
    keep_bars: bool = False  # whether the bars of runs that are over stay
    say: Callable[[str], None] = print  # where lines about the progress go
    fail: Callable[[str], None] | None = None  # where a failure goes, if elsewhere; what it raises ends the other runs
    failed: dict[str, str] = field(default_factory=dict, init=False)
    """Folder's name -> why, of the runs that failed or that lack one that failed."""

    def __post_init__(self) -> None:
        self._free = [self.devices[number % len(self.devices)] for number in range(self.jobs)]
        self._bars = self.progress or progress_display(None)
        self._started: list[Started] = []

    def run(self, runs: Iterable[Run]) -> int:
        """Train those that are not finished; returns how many were left out because the time was over."""
        waiting = [run for run in runs if run.name not in self.failed]
        try:
            while True:
                self._collect()
                # another process may have finished some meanwhile
                waiting = self._without_hopeless([run for run in waiting if run.result() is None])
                late = self.deadline is not None and time.monotonic() >= self.deadline
                if not self._started and (late or not waiting):
                    return len(waiting)
                begun = None if late else self._start_one(waiting)
                if begun is not None:
                    waiting.remove(begun)
                else:
                    time.sleep(_POLL_SECONDS if self._started else _OTHERS_SECONDS)
        finally:
            for started in self._started:
                self._stop(started)
            self._started.clear()

    def _start_one(self, waiting: Sequence[Run]) -> Run | None:
        if not self._free:
            return None
        mine = {started.run.key for started in self._started}
        for run in waiting:
            if run.key in mine or any(need.result() is None for need in run.needs):
                continue
            lease = Lease.take(run.folder, self.cluster)
            if lease is not None:
                self._start(run, lease, self._free.pop(0))
                return run
        return None

    def _start(self, run: Run, lease: Lease, device: str) -> None:
        """Submit a run. What an earlier, interrupted one left is removed: the run begins anew."""
        for path in lease.folder.iterdir():
            if path.name != LEASE:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        variables = {key: os.environ[key] for key in ("CUDA_VISIBLE_DEVICES",) if key in os.environ}
        machine = {"device": device, "threads": self.threads, "val_every": self.val_every, "variables": variables}
        write_json(lease.folder / JOB, run.job(**machine))
        try:
            job = self._submit(lease, run, device)
        except BaseException:
            lease.release()
            raise
        (lease.folder / LOG).symlink_to(os.path.relpath(job.paths.stdout, lease.folder))
        bar = self._bars.add_task(f"{run.data} {run.arm}, seed {run.seed}", total=max(1, run.epochs), note="starting")
        self._started.append(Started(run, lease, device, job, bar))
        self._say(f"started  {lease.folder.name} ({run.epochs} epochs, {device})")

    def _say(self, text: str) -> None:
        self.say(f"{time.strftime('%H:%M:%S')} {text}")

    def _submit(self, lease: Lease, run: Run, device: str) -> Any:
        with needs_extra("study"):
            import submitit
        try:
            executor = submitit.AutoExecutor(lease.folder / "submitit", cluster=self.cluster)
            settings: dict[str, Any] = {"name": run.name, "stderr_to_stdout": True, "timeout_min": _YEAR}
            if self.cluster == "slurm":
                settings |= {"timeout_min": _DAY, "cpus_per_task": self.threads}
                settings |= {"gpus_per_node": 1} if device != "cpu" else {}
            own = {f"slurm_{key}": value for key, value in self.slurm.items()}
            executor.update_parameters(**settings, **own)
            with _surroundings(self.threads):
                return executor.submit(worker.work, str(lease.folder / JOB), lease.token)
        except (NameError, RuntimeError, ValueError) as error:
            raise StudyError(f"The job cannot be submitted: {error}") from error

    def _collect(self) -> None:
        for started in list(self._started):
            run, folder = started.run, started.lease.folder
            started.lease.beat()
            if not started.job.done():
                self._show(started)
                continue
            started.ended = started.ended or time.monotonic()
            result = run.result()
            if result is None and self.cluster != "local" and time.monotonic() - started.ended < _LATE_SECONDS:
                continue
            self._started.remove(started)
            self._free.append(started.device)
            started.lease.release()
            self._bars.update(started.bar, completed=float(max(1, run.epochs)), visible=self.keep_bars)
            if result is None:
                self._report_failure(started)
                continue
            value, seconds = result["results"]["val"]["map50_95"], result["cpu_s"]
            self._bars.update(started.bar, note=f"epoch {run.epochs}/{run.epochs}")
            self._say(f"finished {folder.name}: val mAP50-95 {100 * (value or 0):.1f}, {seconds:.0f} CPU s")

    def _report_failure(self, started: Started) -> None:
        log = started.lease.folder / LOG
        lines = log_tail(log)
        killed = "it was killed, perhaps for want of memory"
        reason = lines[-1] if lines and started.job.paths.result_pickle.exists() else killed
        self.failed[started.run.name] = reason
        tail = "\n".join(f"  {line}" for line in lines)
        (self.fail or self.say)(f"FAILED {started.run.name} ({reason}). The end of {log}:\n{tail}")

    def _show(self, started: Started) -> None:
        """Move the run's bar; a file that is not there yet leaves it as it is."""
        with suppress(OSError, ValueError):
            done, total = float(read_json(started.lease.folder / worker.PROGRESS)["epochs"]), started.run.epochs
            note = "measuring" if done >= total else f"epoch {int(done) + 1}/{total}"
            self._bars.update(started.bar, completed=done, note=note)

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

    def _stop(self, started: Started) -> None:
        """End a run that is under way and give its folder free."""
        started.lease.release()
        if self.cluster != "local":
            started.job.cancel(check=False)
            return
        import psutil  # type: ignore[import-untyped]

        with suppress(psutil.Error):
            process = psutil.Process(int(started.job.job_id))
            processes = [*process.children(recursive=True), process]
            for each in processes:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs(processes, timeout=_END_SECONDS)


@contextmanager
def _surroundings(threads: int) -> Iterator[None]:
    """What a job takes over from this process when it is submitted: variables, and to leave Ctrl-C to the study."""
    number = str(threads)
    variables = {
        # Threads that wait for each other give their core away sooner: on idle cores this costs nothing, beside
        # other programs two threads were seven times faster with it.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": number,
        "MKL_NUM_THREADS": number,
    }
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for key, value in before.items():
            os.environ.pop(key, None)
            os.environ.update({key: value} if value is not None else {})


def log_tail(file: Path) -> list[str]:
    """The last lines of a log; of a line that a progress bar rewrote, its last state."""
    text = file.read_text(errors="replace") if file.is_file() else ""
    lines = [line.split("\r")[-1].rstrip() for line in text.split("\n")]
    return [line for line in lines if line][-_TAIL_LINES:]


def progress_display(console: Console | None, **options: Any) -> Progress:
    """The progress display: run, bar, where in it, time spent and time left; without a console it shows nothing."""
    with needs_extra("study"):
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    columns = (
        TextColumn("{task.description}", justify="right", markup=False),
        BarColumn(),
        TextColumn("{task.fields[note]:<20}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=console is None, speed_estimate_period=120, **options)
