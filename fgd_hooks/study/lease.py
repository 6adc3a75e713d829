"""Who has a run's folder: a lease that one study holds, on whatever machine, and that ends with it.

Several studies may share a folder, on one machine or on many. A lease is a file in the run's folder. On the machine
where its study runs, it is worth as much as that process lives. Elsewhere nobody can ask for a process, so the holder
touches the file (its heartbeat), and it counts until that is old. Jobs of a cluster may outlive their study: they touch
the file themselves.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fgd_hooks.errors import needs_extra
from fgd_hooks.study.plan import read_result
from fgd_hooks.utils.files import read_json, write_json

LEASE, GUARD = "running.json", ".lock"
BEAT_SECONDS, OLD_SECONDS = 30.0, 600.0
_CHECK_SECONDS, _MISSES = 1.0, 3
_SAME_START = 60.0  # seconds; the clock that start times are computed from may be set while a process runs


@dataclass(frozen=True)
class Lease:
    """One study's hold of a run's folder."""

    folder: Path
    token: str  # tells it from every other
    host: str
    pid: int  # of the study
    since: float  # when that process was started: its successor with the same id has another start
    cluster: str  # "local": the job ends with the study; else it may outlive it

    @classmethod
    def take(cls, folder: Path, cluster: str = "local") -> Lease | None:
        """Take a run's folder for this process; None where it is finished or somebody has it."""
        folder.mkdir(parents=True, exist_ok=True)
        with _guard(folder):  # two may find the same lease of a dead one
            if read_result(folder) is not None or in_progress(folder):
                return None
            lease = cls(folder, uuid.uuid4().hex, _host(), os.getpid(), _since(os.getpid()) or 0.0, cluster)
            values = {key: value for key, value in dataclasses.asdict(lease).items() if key != "folder"}
            write_json(folder / LEASE, values)
        return lease

    @classmethod
    def read(cls, folder: Path) -> Lease | None:
        """The lease of a folder, of whomever; None where there is none or it cannot be read."""
        try:
            return cls(folder, **read_json(folder / LEASE))
        except (OSError, ValueError, TypeError):
            return None

    def held(self) -> bool:
        """Whether this is still the folder's lease."""
        found = Lease.read(self.folder)
        return found is not None and found.token == self.token

    def alive(self) -> bool:
        """Whether its holder lives: the process, where it can be asked for, else by the heartbeat."""
        if self.cluster == "local" and self.host == _host():
            since = _since(self.pid)
            return since is not None and abs(since - self.since) < _SAME_START
        try:
            return time.time() - (self.folder / LEASE).stat().st_mtime < OLD_SECONDS
        except OSError:
            return False

    def beat(self) -> None:
        """Touch the file where the last heartbeat is some time ago."""
        with suppress(OSError):
            if time.time() - (self.folder / LEASE).stat().st_mtime > BEAT_SECONDS and self.held():
                os.utime(self.folder / LEASE)

    def release(self) -> None:
        """Give the folder free, unless somebody else has taken it since."""
        with _guard(self.folder):
            if self.held():
                (self.folder / LEASE).unlink()

    def end_without(self) -> None:
        """Let this process keep the lease alive, and end soon after the lease does.

        It ends when the lease is released or taken by another study, and on one machine when its study was killed.
        """

        def watch() -> None:
            misses = 0
            while misses < _MISSES:  # a shared folder may be out of reach for a moment
                lost = not self.held() or (self.cluster == "local" and not self.alive())
                misses = misses + 1 if lost else 0
                self.beat()
                time.sleep(_CHECK_SECONDS)
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def in_progress(folder: Path) -> bool:
    """Whether somebody who lives has the run's folder."""
    lease = Lease.read(folder)
    return lease is not None and lease.alive()


@contextmanager
def _guard(folder: Path) -> Iterator[None]:
    """One process at a time changes leases below a folder."""
    with needs_extra("study"):
        from filelock import FileLock
    with FileLock(folder.parent / GUARD):
        yield


def _host() -> str:
    """This machine and, on Linux, its space of process ids: in another container the same id is another process."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _since(pid: int) -> float | None:
    """When a process was started; None: there is none."""
    with needs_extra("study"):
        import psutil  # type: ignore[import-untyped]
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None
