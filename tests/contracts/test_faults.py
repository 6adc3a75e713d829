"""Trainings that are killed or cannot write, and resumed ones; ``tests/faults.py`` does the killing."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ultralytics")

from fgd_hooks import FGDCallback
from fgd_hooks.integrations.ultralytics import checkpoint
from fgd_hooks.utils.checkpoint import LAST_CHECKPOINT, read_checkpoint

ROOT = Path(__file__).parents[2]


def run(program, *arguments):
    """Run Python in a process of its own; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *program, *map(str, arguments)]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def study(tmp_path, *arguments):
    """The figures of ``python -m tests.helpers.faults``."""
    file = tmp_path / "figures.json"
    run(["-m", "tests.helpers.faults"], *arguments, "--out", file)
    return json.loads(file.read_text())


@pytest.fixture
def host_log(caplog):
    from ultralytics.utils import LOGGER

    LOGGER.addHandler(caplog.handler)
    yield caplog
    LOGGER.removeHandler(caplog.handler)


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


@forks
@pytest.mark.slow
def test_a_killed_training_resumes(tmp_path):
    half, between = study(tmp_path, "aimed")["found"]
    for found in (half, between):
        assert found["killed"]
        assert (found["host"], found["side"], found["epochs_behind"]) == (1, 0, 1), "the side file is the one before"
        assert found["outcome"] == "resumed, adapters behind, said so"
    assert half["leftovers"] == 1, "the temporary file of the write that was killed; the resumed run removes it"
    assert between["leftovers"] == 0


@forks
@pytest.mark.slow
def test_killed_at_a_hundred_moments(tmp_path):
    assert study(tmp_path, "--moments", 100)["failures"] == []


def test_a_full_disk_is_said_once_and_the_training_goes_on(train, teacher_file, tmp_path, monkeypatch, host_log):
    path = tmp_path / "run" / "weights" / LAST_CHECKPOINT
    real, tried = checkpoint.write_checkpoint, []

    def write(target, content):
        tried.append(content["epoch"])
        if content["epoch"] in (1, 2, 4):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(target, content)

    monkeypatch.setattr(checkpoint, "write_checkpoint", write)
    seen = []
    look = ("on_fit_epoch_end", lambda trainer: seen.append(read_checkpoint(path)["epoch"]))
    train(FGDCallback(teacher_file, log_interval=0), epochs=6, hooks=[look])
    assert tried == [0, 1, 2, 3, 4, 5]
    assert seen[:6] == [0, 0, 0, 3, 3, 5], "the file is whole at any time"
    assert host_log.text.count("could not be written") == 2, "once for each time that the disk was full"
    assert host_log.text.count("No space left") == 2
    assert host_log.text.count("is written again") == 2


WRITE_TOO_MUCH = """
import resource, signal, sys
from pathlib import Path
import torch
from fgd_hooks.utils.checkpoint import write_checkpoint

path = Path(sys.argv[1])
write_checkpoint(path, {"epoch": 1})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_checkpoint(path, {"epoch": 2, "tensor": torch.zeros(100_000)})
except OSError:
    print("refused")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX does")
def test_a_write_that_really_fails_leaves_no_broken_file(tmp_path):
    """The kernel refuses to let a file grow beyond 4 kB."""
    path = tmp_path / LAST_CHECKPOINT
    assert run(["-c", WRITE_TOO_MUCH], path).strip() == "refused"
    assert read_checkpoint(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == [LAST_CHECKPOINT]


@forks
@pytest.mark.slow
def test_a_resumed_run_is_as_near_to_the_straight_one_as_the_hosts_own(tmp_path):
    """Ultralytics resumes from weights in half precision: it is not bit-equal itself."""
    figures = study(tmp_path, "resumed")
    assert figures["stock"] > 0, "the host has become bit-equal: then so must we"
    assert figures["distilled"] < 2 * figures["stock"]
