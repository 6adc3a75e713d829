"""Trainings that are killed or cannot write, and resumed ones; ``tests/faults.py`` does the killing."""

import errno
import random
import resource
import signal
from functools import partial

import pytest
import torch

pytest.importorskip("ultralytics")

from fgd_hooks import FGDCallback
from fgd_hooks.integrations import ultralytics_run
from fgd_hooks.integrations.ultralytics_run import SIDE_FILE
from fgd_hooks.sidefile import read_side_file
from tests import faults

pytestmark = pytest.mark.skipif(not hasattr(faults.os, "fork"), reason="kills forked processes")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    assert faults.forked(lambda: faults.prepare(folder), folder / "prepare.log") == 0
    return folder


@pytest.fixture
def host_log(caplog):
    from ultralytics.utils import LOGGER

    LOGGER.addHandler(caplog.handler)
    yield caplog
    LOGGER.removeHandler(caplog.handler)


@pytest.mark.parametrize("kind", ["half written", "between host's checkpoint and ours"])
def test_a_killed_training_resumes(place, kind):
    class SecondEpoch(random.Random):
        def randrange(self, *args):
            return 1

    found = faults.moment(place, kind.split()[0], kind, SecondEpoch(0), 0)
    assert found["killed"]
    assert (found["host"], found["side"], found["epochs_behind"]) == (1, 0, 1), "the side file is the one before"
    assert found["leftovers"] == (kind == "half written")
    assert found["outcome"] == "resumed, adapters behind, said so"
    assert found["ok"], found


@pytest.mark.slow
def test_killed_at_a_hundred_moments(tmp_path):
    result = faults.study(tmp_path, 100)
    assert not result["failures"], result


def test_a_full_disk_is_said_once_and_the_training_goes_on(train, teacher_file, tmp_path, monkeypatch, host_log):
    path = tmp_path / "run" / "weights" / SIDE_FILE
    real, tried = ultralytics_run.write_side_file, []

    def write(target, content):
        tried.append(content["epoch"])
        if content["epoch"] in (1, 2, 4):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(target, content)

    monkeypatch.setattr(ultralytics_run, "write_side_file", write)
    seen = []
    look = ("on_fit_epoch_end", lambda trainer: seen.append(read_side_file(path)["epoch"]))
    train(FGDCallback(teacher_file, log_interval=0), epochs=6, hooks=[look])
    assert tried == [0, 1, 2, 3, 4, 5]
    assert seen[:6] == [0, 0, 0, 3, 3, 5], "the file is whole at any time"
    assert host_log.text.count("could not be written") == 2, "once for each time that the disk was full"
    assert host_log.text.count("No space left") == 2
    assert host_log.text.count("is written again") == 2


def test_a_write_that_really_fails_leaves_no_broken_file(tmp_path):
    """The kernel refuses to let a file grow beyond 4 kB, in a process of its own."""

    def work():
        from fgd_hooks.sidefile import write_side_file

        path = tmp_path / SIDE_FILE
        write_side_file(path, {"epoch": 1})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write_side_file(path, {"epoch": 2, "tensor": torch.zeros(100_000)})
        except OSError:
            return
        raise AssertionError("the write went through")

    log = tmp_path / "log"
    assert faults.forked(work, log) == 0, log.read_text()
    log.unlink()
    assert read_side_file(tmp_path / SIDE_FILE)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == [SIDE_FILE]


def end_states(folder, distil, name):
    """The student's weights at the end of a training without and with an interruption after its first epoch."""
    names = {False: f"{name}-straight", True: f"{name}-resumed"}
    for interrupted, run in names.items():

        def keep(trainer, run=run):
            if trainer.epoch == faults.EPOCHS - 1:
                torch.save(trainer.model.state_dict(), folder / f"{run}.pt")

        def stop(trainer):
            if trainer.epoch == 1:
                faults.os.kill(faults.os.getpid(), signal.SIGKILL)

        log, hooks = folder / f"{run}.log", [("on_train_epoch_end", keep)]
        if interrupted:
            kill = [("on_train_epoch_start", stop)]
            faults.forked(partial(faults.train, folder, run, distil=distil, hooks=kill), log)
        work = partial(faults.train, folder, run, resume=interrupted, distil=distil, hooks=hooks)
        assert faults.forked(work, log) == 0, log.read_text()[-2000:]
    return [torch.load(folder / f"{run}.pt", weights_only=True) for run in names.values()]


def distance(states):
    """|a - b| / |a| over all weights."""
    one, other = ([value.double().flatten() for value in state.values()] for state in states)
    difference = sum(float((a - b).square().sum()) for a, b in zip(one, other, strict=True))
    return (difference / sum(float(a.square().sum()) for a in one)) ** 0.5


@pytest.mark.slow
def test_a_resumed_run_is_as_near_to_the_straight_one_as_the_hosts_own(place):
    """Ultralytics resumes from weights in half precision: it is not bit-equal itself."""
    stock = distance(end_states(place, False, "stock"))
    ours = distance(end_states(place, True, "distilled"))
    print(f"resumed against straight: stock {stock:.3e}, distilled {ours:.3e}")
    assert stock > 0, "the host has become bit-equal: then so must we"
    assert ours < 2 * stock
