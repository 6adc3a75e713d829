"""Kill trainings with SIGKILL and resume them: ``python -m tests.helpers.faults --moments 100``.

Each moment trains the tiny YOLO of the tests with FGDCallback in a process of its own, kills it, looks at what lies on
the disk, and resumes. The processes are forked from one that has imported everything already and has no threads, so a
test runs this file as a program. ``aimed``: two kills alone. ``resumed``: how far a resumed training ends from an
uninterrupted one.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fgd_hooks import FGDCallback
from fgd_hooks.errors import CheckpointError
from fgd_hooks.utils import checkpoint as sidefile
from fgd_hooks.utils.checkpoint import LAST_CHECKPOINT, read_checkpoint
from tests.conftest import SETTINGS, TINY, WIDE, architecture

EPOCHS = 3
BATCHES = 2  # in each epoch
WRITING = ("half written", "before fsync", "before rename", "after rename")
KINDS = ("any moment", "in an epoch", "between host's checkpoint and ours", *WRITING)


def forked(work: Callable[[], None], log: Path, kill_after: float | None = None) -> int:
    """Run ``work`` in a forked process, its output in ``log``; returns its exit code, negative for a signal."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            # a test runner's own streams would not lead there
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def prepare(folder: Path) -> None:
    """Data, the student's architecture and a trained teacher, in ``folder``."""
    from ultralytics import YOLO

    from fgd_hooks.study.scenes import SceneSettings, make_dataset

    data = make_dataset(folder / "scenes", SceneSettings(train=4 * BATCHES, val=2, size=64))
    for name, scales in (("student", TINY), ("wide", WIDE)):
        (folder / name).mkdir()
        architecture(folder / name, "yolo26n.yaml", scales)
    teacher = YOLO(str(folder / "wide" / "tiny_yolo26n.yaml"))
    teacher.train(data=str(data), epochs=1, project=str(folder), name="teacher", seed=3, **SETTINGS)


def train(folder: Path, name: str, *, resume: bool = False, distil: bool = True, hooks: Any = ()) -> None:
    """One training in ``folder/name``; the hooks are called before those of the callback."""
    from ultralytics import YOLO
    from ultralytics.utils import LOGGER

    LOGGER.addHandler(logging.StreamHandler(sys.stderr))
    weights = folder / name / "weights" / "last.pt"
    model = YOLO(str(weights if resume else folder / "student" / "tiny_yolo26n.yaml"))
    for event, function in hooks:
        model.add_callback(event, function)
    if distil:
        teacher = folder / "teacher" / "weights" / "last.pt"
        FGDCallback(teacher, log_interval=0, schedule={"stop": None}).attach(model)
    data = next((folder / "scenes").glob("*.yaml"))
    settings = {**SETTINGS, "data": str(data), "project": str(folder), "name": name, "epochs": EPOCHS}
    model.train(**settings, resume=resume)


def kill_in_write(kind: str, fraction: float) -> None:
    """From now on, the next write of the side file kills this process."""

    def die(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def half(*args: Any) -> None:
        size = os.stat(args[0]).st_size
        os.truncate(args[0], int(size * fraction))
        die()

    def replace(source: str, target: Path) -> None:
        os.replace(source, target)
        die()

    changed = {
        "half written": {"fsync": half},
        "before fsync": {"fsync": die},
        "before rename": {"replace": die},
        "after rename": {"replace": replace},
    }[kind]
    sidefile.os = types.SimpleNamespace(**{**vars(os), **changed})  # type: ignore[attr-defined]


def hooks_of(kind: str, rng: random.Random) -> list[Any]:
    """What kills a training by itself at the moment that ``kind`` says."""
    epoch, batch, fraction = rng.randrange(EPOCHS), rng.randrange(BATCHES), rng.random()
    seen = collections.Counter[int]()

    def in_batch(trainer: Any) -> None:
        seen[trainer.epoch] += 1
        if trainer.epoch == epoch and seen[epoch] == batch + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def after_host(trainer: Any) -> None:
        if trainer.epoch == epoch:
            os.kill(os.getpid(), signal.SIGKILL)

    def in_write(trainer: Any) -> None:
        if trainer.epoch == epoch:
            kill_in_write(kind, fraction)

    if kind == "in an epoch":
        return [("on_train_batch_start", in_batch)]
    if kind == "between host's checkpoint and ours":
        return [("on_model_save", after_host)]
    return [("on_model_save", in_write)] if kind in WRITING else []


def checkpoint_epoch(path: Path) -> int | str:
    """The epoch of the host's checkpoint, "finished" after the host's last touch, or "missing" or "truncated"."""
    if not path.is_file():
        return "missing"
    try:
        epoch = int(torch.load(path, map_location="cpu", weights_only=False)["epoch"])
    except Exception:  # whatever torch finds wrong with a file that ends too early
        return "truncated"
    return "finished" if epoch in (-1, EPOCHS - 1) else epoch


def side_epoch(path: Path) -> int | str:
    """The epoch of the side file, or "missing" or "damaged"."""
    try:
        return int(read_checkpoint(path)["epoch"])
    except FileNotFoundError:
        return "missing"
    except CheckpointError:
        return "damaged"


def moment(folder: Path, name: str, kind: str, rng: random.Random, seconds: float) -> dict[str, Any]:
    """One kill and what came of it.

    Args:
        folder: what :func:`prepare` filled.
        name: of the training's folder.
        kind: one of ``KINDS``.
        rng: draws the moment.
        seconds: how long an undisturbed training takes; only for "any moment".
    """
    log, weights = folder / f"{name}.log", folder / name / "weights"
    delay = rng.uniform(0, seconds) if kind == "any moment" else None
    hooks = hooks_of(kind, rng)
    code = forked(lambda: train(folder, name, hooks=hooks), log, kill_after=delay)
    host, side = checkpoint_epoch(weights / "last.pt"), side_epoch(weights / LAST_CHECKPOINT)
    leftovers = len(list(weights.glob(f".{LAST_CHECKPOINT}.*")))
    found: dict[str, Any] = {"kind": kind, "killed": code == -signal.SIGKILL, "host": host, "side": side}
    found["leftovers"] = leftovers
    if host == "finished":
        found["outcome"] = "nothing to resume" if side == EPOCHS - 1 else "finished, side file behind"
        found["ok"] = side != "damaged"
        return found
    resume = isinstance(host, int)
    again = folder / f"{name}-again.log"
    code = forked(lambda: train(folder, name, resume=resume), again)
    text = again.read_text(errors="replace")
    behind, anew = "the checkpoint of epoch" in text, "start anew" in text
    found["epochs_behind"] = host - side if isinstance(host, int) and isinstance(side, int) else None
    said = (anew and side == "missing") or (behind and side != host) or (side == host and not behind and not anew)
    whole = side_epoch(weights / LAST_CHECKPOINT) == EPOCHS - 1 and checkpoint_epoch(weights / "last.pt") == "finished"
    clean = not list(weights.glob(f".{LAST_CHECKPOINT}.*"))
    found["ok"] = side != "damaged" and code == 0 and (said or not resume) and whole and clean
    if not resume:
        found["outcome"] = f"host's checkpoint {host}: begun afresh"
    elif side == host:
        found["outcome"] = "resumed, nothing lost"
    else:
        found["outcome"] = "resumed with new adapters, said so" if anew else "resumed, adapters behind, said so"
    return found


def study(folder: Path, moments: int, seed: int = 0) -> dict[str, Any]:
    """``moments`` kills, the kinds in turn; returns the outcomes by kind and all that was not ok."""
    rng = random.Random(seed)
    prepare_apart(folder)
    start = time.monotonic()
    succeed(lambda: train(folder, "undisturbed"), folder / "undisturbed.log")
    seconds = time.monotonic() - start
    found = []
    for number in range(moments):
        kind = KINDS[0] if number % 2 else KINDS[1 + number // 2 % (len(KINDS) - 1)]
        found.append(moment(folder, f"run{number}", kind, rng, seconds))
        print(json.dumps(found[-1]), flush=True)
    table: dict[str, dict[str, int]] = {}
    for each in found:
        outcomes = table.setdefault(each["kind"], {})
        outcomes[each["outcome"]] = outcomes.get(each["outcome"], 0) + 1
    return {"moments": moments, "seed": seed, "outcomes": table, "failures": [f for f in found if not f["ok"]]}


class SecondEpoch(random.Random):
    """Draws the second epoch (and the second batch) each time."""

    def randrange(self, *args: Any) -> int:
        """Always 1."""
        return 1


def aimed(folder: Path) -> dict[str, Any]:
    """Two kills in the second epoch, both of which leave the side file of the first."""
    prepare_apart(folder)
    kinds = ("half written", "between host's checkpoint and ours")
    found = [moment(folder, f"aimed{number}", kind, SecondEpoch(0), 0) for number, kind in enumerate(kinds)]
    return {"found": found, "failures": [each for each in found if not each["ok"]]}


def end_states(folder: Path, distil: bool, name: str) -> list[dict[str, torch.Tensor]]:
    """The student's weights at the end of a training without, and of one with a kill after its first epoch."""
    names = {False: f"{name}-straight", True: f"{name}-resumed"}
    for interrupted, run in names.items():

        def keep(trainer: Any, run: str = run) -> None:
            if trainer.epoch == EPOCHS - 1:
                torch.save(trainer.model.state_dict(), folder / f"{run}.pt")

        def stop(trainer: Any) -> None:
            if trainer.epoch == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        log, hooks = folder / f"{run}.log", [("on_train_epoch_end", keep)]
        if interrupted:
            kill = [("on_train_epoch_start", stop)]
            forked(partial(train, folder, run, distil=distil, hooks=kill), log)
        succeed(partial(train, folder, run, resume=interrupted, distil=distil, hooks=hooks), log)
    return [torch.load(folder / f"{run}.pt", weights_only=True) for run in names.values()]


def distance(states: list[dict[str, torch.Tensor]]) -> float:
    """|a - b| / |a| over all weights and batch statistics; without the counters of batches."""
    one, other = (
        [value.double().flatten() for value in state.values() if value.is_floating_point()] for state in states
    )
    difference = sum(float((a - b).square().sum()) for a, b in zip(one, other, strict=True))
    return float((difference / sum(float(a.square().sum()) for a in one)) ** 0.5)


def resumed(folder: Path) -> dict[str, Any]:
    """How far a resumed training ends from an uninterrupted one: the host's own, and with distillation."""
    prepare_apart(folder)
    stock, ours = (distance(end_states(folder, distil, f"distil{distil}")) for distil in (False, True))
    return {
        "stock": stock,
        "distilled": ours,
        "failures": [] if ours < 2 * stock else ["farther than twice the host's"],
    }


def prepare_apart(folder: Path) -> None:
    """:func:`prepare` in a process of its own, so that this one stays without threads and can be forked."""
    succeed(lambda: prepare(folder), folder / "prepare.log")


def succeed(work: Callable[[], None], log: Path) -> None:
    """Run ``work`` in a forked process that must end well."""
    if forked(work, log) != 0:
        raise RuntimeError(log.read_text()[-3000:])


def main() -> int:
    """Run one of the studies and print its figures as JSON; the exit code is 1 where something was not as it should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", nargs="?", choices=("moments", "aimed", "resumed"), default="moments")
    parser.add_argument("--moments", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the figures as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.study == "moments":
            result = study(folder, arguments.moments, arguments.seed)
        else:
            result = {"aimed": aimed, "resumed": resumed}[arguments.study](folder)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
