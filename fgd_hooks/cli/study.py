"""The ``fgd study`` command."""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgd_hooks.errors import StudyError

if TYPE_CHECKING:
    from fgd_hooks.study.plan import Plan, Planner

RESULTS = Path("results")
EPILOG = """\
examples:
  fgd study configs/studies/default.yaml --data-root DATA --dry-run
  fgd study configs/studies/default.yaml --data-root DATA --jobs 2 --max-minutes 90
  fgd study configs/studies/default.yaml --data-root DATA --cluster slurm --slurm partition=gpu time=120 --device 0
  fgd study configs/studies/default.yaml --data-root DATA --test
  fgd study configs/studies/default.yaml --data-root DATA --collect
  fgd study results/default --table
"""
DIRECTORY: dict[str, Any] = {"type": Path, "nargs": "?", "const": RESULTS, "metavar": "DIR"}
ARGUMENTS: list[tuple[str, str, dict[str, Any]]] = [
    ("study", "study file; with --table also a folder of collected results", {"type": Path}),
    ("--out", "folder of the runs; studies share it", {"type": Path, "default": Path("runs/studies")}),
    ("--data-root", "folder of the data sets ($FGD_DATA)", {"type": Path}),
    (
        "--jobs",
        "trainings at a time, one thread each (default: as many as cores, or as GPUs are given; on a cluster 100)",
        {"type": int},
    ),
    ("--device", "devices as in Ultralytics, given out in turn: cpu, or 0,1", {"default": "cpu"}),
    ("--cluster", "where the trainings run", {"choices": ("local", "slurm"), "default": "local"}),
    (
        "--slurm",
        "of SLURM's jobs: partition=, time= (minutes), account=, gpus_per_node=, mem=, ...",
        {"nargs": "+", "default": [], "metavar": "KEY=VALUE"},
    ),
    ("--only", "these arms only", {"nargs": "+", "metavar": "ARM"}),
    ("--data", "these data sets only", {"nargs": "+", "metavar": "NAME"}),
    ("--seeds", "these seeds only", {"type": int, "nargs": "+"}),
    ("--max-minutes", "start no training after so many minutes", {"type": float}),
    ("--dry-run", "list the runs and what is done", {"action": "store_true"}),
    ("--test", "measure the finished runs on test, each once and for all", {"action": "store_true"}),
    ("--collect", f"keep the finished runs' figures and logs in DIR/STUDY ({RESULTS})", DIRECTORY),
    ("--table", f"make tables and plots from DIR/STUDY ({RESULTS}) alone", DIRECTORY),
]


def quickstart_command(arguments: argparse.Namespace) -> None:
    """``fgd quickstart``: prints its own table."""
    from fgd_hooks.study.quickstart import quickstart

    quickstart(arguments.out, seeds=arguments.seeds)


def study_command(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns 1 where a run failed."""
    file = arguments.study
    if arguments.table is not None and file.is_dir():
        return _table(file)

    from fgd_hooks.study.plan import Planner
    from fgd_hooks.study.spec import check_training, load_study

    spec = load_study(file)
    for given, known, kind in (
        (arguments.only, spec.arms, "arm"),
        (arguments.data, spec.data, "data set"),
        (arguments.seeds, spec.seeds, "seed"),
    ):
        for name in given or ():
            if name not in known:
                raise StudyError(f"There is no {kind} {name!r} in {file}; it has {', '.join(map(str, known))}.")
    devices, jobs = _slots(arguments)
    root = os.environ.get("FGD_DATA") if arguments.data_root is None else arguments.data_root
    planner = Planner(spec, file.resolve(), arguments.out.resolve(), Path(root) if root else None)
    wanted = (arguments.only, arguments.data, arguments.seeds)
    after = arguments.test or arguments.collect or arguments.table
    if arguments.dry_run and after:
        raise StudyError("--dry-run goes alone: it only lists what there is to train.")
    if not after:
        check_training(spec, planner.model)
        return _list(planner.plan(*wanted)) if arguments.dry_run else _train(planner, arguments, devices, jobs)
    # in the order in which each finds what the one before has left
    if arguments.test:
        _test(planner.plan(*wanted), devices[0])
    if arguments.collect is not None:
        from fgd_hooks.study.records import collect

        folder = arguments.collect / spec.name
        count, removed = collect(spec, planner.plan(*wanted), folder, planner.plan(data=arguments.data))
        print(f"{count} runs in {folder}")
        for name in removed:
            print(f"removed {name}: the study has it no more, or with other settings")
    if arguments.table is not None:
        return _table((arguments.collect or arguments.table) / spec.name)
    return 0


def _slots(arguments: argparse.Namespace) -> tuple[list[str], int]:
    """The devices, and how many trainings run at a time."""
    devices = [device.strip() for device in arguments.device.split(",")]
    if not all(devices):
        raise StudyError(f"--device is {arguments.device!r}; expected cpu, or devices with commas between: 0,1.")
    if arguments.cluster != "local" and len(devices) > 1:
        raise StudyError(f"--device is {arguments.device!r}; a job of a cluster has a GPU of its own: --device 0.")
    if arguments.jobs is not None and arguments.jobs < 1:
        raise StudyError(f"--jobs is {arguments.jobs}; expected 1 or more.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    many = 100 if arguments.cluster != "local" else cores if devices == ["cpu"] else len(devices)
    return devices, arguments.jobs or many


def _slurm(texts: list[str]) -> dict[str, Any]:
    """``["partition=gpu", "time=120"]`` as settings."""
    pairs = [text.partition("=") for text in texts]
    for key, sign, _ in pairs:
        if not (key and sign):
            raise StudyError(f"--slurm: {key!r} cannot be read; expected key=value.")
    return {key: int(value) if value.isdigit() else value for key, _, value in pairs}


def _train(planner: Planner, arguments: argparse.Namespace, devices: list[str], jobs: int) -> int:
    from rich.console import Console

    from fgd_hooks.study.data import scan_labels
    from fgd_hooks.study.runner import Runner, progress_display

    end_on_terminate()
    limit, console = arguments.max_minutes, Console()
    with progress_display(console if console.is_terminal else None, transient=True) as progress:
        runner = Runner(
            jobs,
            devices,
            cluster=arguments.cluster,
            slurm=_slurm(arguments.slurm),
            deadline=None if limit is None else time.monotonic() + 60 * limit,
            progress=progress,
            say=lambda text: print(text, flush=True),
        )
        scanned: set[Path] = set()
        left, first = 0, True
        while True:
            plan = planner.plan(arguments.only, arguments.data, arguments.seeds)
            open_runs = [run for run in plan.runs if run.result() is None and run.name not in runner.failed]
            if not (open_runs or first):  # what is not planned yet waits for a run that failed
                break
            print(f"{len(plan.runs)} runs, {len(plan.runs) - len(open_runs)} done before", flush=True)
            for run in open_runs:
                if run.prepared.yaml not in scanned:
                    scan_labels(run.prepared)
                    scanned.add(run.prepared.yaml)
            left = runner.run(plan.runs)
            if left or not plan.waiting:
                break
            first = False
    if left:
        print(f"The time is over: {left} runs are left; the same command goes on with them.")
    for text in plan.waiting:
        print(f"not planned yet: {text}")
    for name, reason in runner.failed.items():
        print(f"failed: {name} ({reason})")
    return int(bool(runner.failed))


def end_on_terminate() -> None:
    """Leave this process by an exception when it is asked to end, so that the trainings are ended on the way out."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)


def _list(plan: Plan) -> int:
    from fgd_hooks.study.lease import in_progress

    for run in plan.runs:
        state = "done" if run.result() else "running" if in_progress(run.folder) else "to do"
        state += ", tested" if run.test() else ""
        print(f"{state:<14} {run.folder.name:<60} {run.epochs:>4} epochs")
    for text in plan.waiting:
        print(f"{'later':<14} {text}")
    return 0


def _test(plan: Plan, device: str) -> None:
    """Measure every run on test that was not measured there before."""
    from fgd_hooks.study import worker
    from fgd_hooks.study.plan import TEST
    from fgd_hooks.utils.files import write_json

    tested = [run for run in plan.runs if "test" in run.prepared.counts]
    if not tested:
        raise StudyError("None of the study's data sets has a test split.")
    missing = [run.name for run in tested if run.result() is None]
    if missing or plan.waiting:
        raise StudyError(
            f"{len(missing)} runs are not finished ({', '.join(missing[:3])}{', ...' if missing[3:] else ''}); test is "
            "measured when no choice is left to make. Narrow the study with --only, --data or --seeds, or finish it."
        )
    for run in tested:
        if run.test() is not None:
            print(f"{run.folder.name}: measured on test before; kept")
            continue
        found = worker.measure(run.job(device=device), "test")
        write_json(run.folder / TEST, {"measured": time.strftime("%Y-%m-%d"), "results": {"test": found}})
        print(f"{run.folder.name}: test mAP50-95 {100 * (found['map50_95'] or 0):.1f}")


def _table(folder: Path) -> int:
    from fgd_hooks.study.tables import write_tables

    print(write_tables(folder))
    return 0
