"""Who has a run's folder: the living keep it, on this machine and on others; of the dead one heir takes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fgd_hooks.errors import StudyError
from fgd_hooks.study import lease as leases
from fgd_hooks.study.lease import LEASE, OLD_SECONDS, Lease, in_progress
from fgd_hooks.study.worker import work

NOBODY = 2**22 + 1  # above the greatest process id of Linux


def change(folder: Path, age: float = 0.0, **values: object) -> None:
    """Make a folder's lease that of another process, with a heartbeat so many seconds ago."""
    file = folder / LEASE
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    os.utime(file, (time.time() - age,) * 2)


@pytest.fixture
def folder(tmp_path):
    """A run's folder with a lease of this process."""
    assert Lease.take(tmp_path / "run") is not None
    return tmp_path / "run"


def test_what_a_living_process_has_is_left_to_it(folder):
    assert in_progress(folder)
    assert Lease.take(folder) is None
    os.utime(folder / LEASE, (0, 0))  # on its own machine it counts without a heartbeat
    assert Lease.take(folder) is None


@pytest.mark.parametrize("dead", [{"pid": NOBODY}, {"since": 1.0}], ids=["ended", "another process has its id"])
def test_what_a_dead_process_had_is_free(folder, dead):
    change(folder, **dead)
    assert not in_progress(folder)
    assert Lease.take(folder) is not None


@pytest.mark.parametrize(
    "other",
    [{"host": "another"}, {"host": f"{leases.socket.gethostname()} pid:[1]"}, {"cluster": "slurm"}],
    ids=["another machine", "another container of this name", "a job of a cluster"],
)
def test_where_nobody_can_ask_for_the_process_the_heartbeat_counts(folder, other):
    change(folder, age=OLD_SECONDS / 2, pid=NOBODY, **other)
    assert in_progress(folder)
    assert Lease.take(folder) is None
    change(folder, age=2 * OLD_SECONDS)
    assert not in_progress(folder)
    assert Lease.take(folder) is not None


def test_a_heartbeat_touches_the_own_lease_alone(folder):
    lease = Lease.read(folder)

    def age() -> float:
        return time.time() - (folder / LEASE).stat().st_mtime

    change(folder, age=10)
    lease.beat()
    assert age() > 5  # not every half second
    change(folder, age=100)
    lease.beat()
    assert age() < 5
    change(folder, age=100, token="another")
    lease.beat()
    assert age() > 50


def test_a_lease_is_given_back_by_its_holder_alone(folder):
    lease = Lease.read(folder)
    change(folder, token="another")
    lease.release()
    assert (folder / LEASE).exists()
    change(folder, token=lease.token)
    lease.release()
    assert not (folder / LEASE).exists()
    lease.release()  # nothing to do


def test_a_finished_run_is_not_taken_and_a_damaged_lease_is_nobody_s(folder):
    (folder / LEASE).write_text('{"pid"')
    assert Lease.read(folder) is None
    lease = Lease.take(folder)
    lease.release()
    (folder / "result.json").write_text("{}")
    assert Lease.take(folder) is None


def test_of_many_that_find_a_dead_lease_one_takes_it(tmp_path):
    for number in range(20):
        folder = tmp_path / str(number)
        assert Lease.take(folder)
        change(folder, since=1.0)
        barrier = threading.Barrier(8)

        def take(folder: Path = folder, barrier: threading.Barrier = barrier) -> Lease | None:
            barrier.wait()
            return Lease.take(folder)

        with ThreadPoolExecutor(8) as pool:
            taken = [future.result() for future in [pool.submit(take) for _ in range(8)]]
        assert sum(each is not None for each in taken) == 1


@pytest.mark.parametrize("how", ["released", pytest.param("taken by another", marks=pytest.mark.slow)])
def test_a_training_ends_with_its_lease(folder, how):
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom fgd_hooks.study.lease import Lease\n"
        "Lease.read(Path(sys.argv[1])).end_without()\nprint('up', flush=True)\ntime.sleep(300)\n"
    )
    command = [sys.executable, "-c", program, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        time.sleep(1.5)
        assert process.poll() is None  # while the lease lasts
        if how == "released":
            Lease.read(folder).release()
        else:
            change(folder, token="another")
        assert process.wait(timeout=30) == 1


def test_a_job_that_comes_too_late_does_nothing(folder):
    (folder / "job.json").write_text("{}")  # of the study that has the folder now
    with pytest.raises(StudyError, match="another study's by now"):
        work(str(folder / "job.json"), "that of an earlier study")
