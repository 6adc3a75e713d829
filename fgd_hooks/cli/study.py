"""The ``fgd study`` command."""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path

from fgd_hooks.errors import StudyError
from fgd_hooks.study.plan import TEST, Plan, Planner
from fgd_hooks.study.settings import check_training
from fgd_hooks.study.spec import load_study

RESULTS = Path("results")


EPILOG = """\
examples:
  fgd study configs/studies/default.yaml --data-root DATA --dry-run
  fgd study configs/studies/default.yaml --data-root DATA --jobs 2 --max-minutes 90
  fgd study configs/studies/default.yaml --data-root DATA --test
  fgd study configs/studies/default.yaml --data-root DATA --collect
  fgd study results/default --table
"""


def add_arguments(study: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fgd study``."""
    study.epilog = EPILOG
    study.add_argument(
        "study",
        type=Path,
        help="study file; with --table also a folder of collected results",
    )
    study.add_argument("--out", type=Path, default=Path("runs/studies"), help="folder of the runs; studies share it")
    root = os.environ.get("FGD_DATA")
    study.add_argument(
        "--data-root", type=Path, default=Path(root) if root else None, help="folder of the data sets ($FGD_DATA)"
    )
    study.add_argument(
        "--jobs",
        type=int,
        help="trainings at a time, one thread each (default: as many as cores, or as GPUs are given)",
    )
    study.add_argument("--device", default="cpu", help="devices as in Ultralytics, given out in turn: cpu, or 0,1")
    study.add_argument("--only", nargs="+", metavar="ARM", help="these arms only")
    study.add_argument("--data", nargs="+", metavar="NAME", help="these data sets only")
    study.add_argument("--seeds", type=int, nargs="+", help="these seeds only")
    study.add_argument("--max-minutes", type=float, help="start no training after so many minutes")
    study.add_argument("--dry-run", action="store_true", help="list the runs and what is done")
    study.add_argument("--test", action="store_true", help="measure the finished runs on test, each once and for all")
    study.add_argument(
        "--collect",
        type=Path,
        nargs="?",
        const=RESULTS,
        metavar="DIR",
        help=f"keep the finished runs' figures and logs in DIR/STUDY ({RESULTS})",
    )
    study.add_argument(
        "--table",
        type=Path,
        nargs="?",
        const=RESULTS,
        metavar="DIR",
        help=f"make tables and plots from DIR/STUDY ({RESULTS}) alone",
    )


def quickstart_command(arguments: argparse.Namespace) -> None:
    """``fgd quickstart``: prints its own table."""
    from fgd_hooks.study.quickstart import quickstart

    quickstart(arguments.out, seeds=arguments.seeds)


def study_command(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns 1 where a run failed."""
    file = arguments.study
    if arguments.table is not None and file.is_dir():
        return _table(file)
    spec = load_study(file)
    for given, known, kind in ((arguments.only, spec.arms, "arm"), (arguments.data, spec.data, "data set")):
        unknown = [name for name in given or () if name not in known]
        if unknown:
            raise StudyError(f"There is no {kind} {unknown[0]!r} in {file}; it has {', '.join(known)}.")
    foreign = [seed for seed in arguments.seeds or () if seed not in spec.seeds]
    if foreign:
        raise StudyError(f"{file} has no seed {foreign[0]}; its seeds are {', '.join(map(str, spec.seeds))}.")
    devices, jobs = _slots(arguments)
    planner = Planner(spec, file.resolve(), arguments.out.resolve(), arguments.data_root)
    wanted = (arguments.only, arguments.data, arguments.seeds)
    if arguments.dry_run and (arguments.test or arguments.collect or arguments.table):
        raise StudyError("--dry-run goes alone: it only lists what there is to train.")
    if arguments.dry_run:
        check_training(spec, planner)
        _list(planner.plan(*wanted))
        return 0
    if not (arguments.test or arguments.collect or arguments.table):
        check_training(spec, planner)
        return _train(planner, arguments, devices, jobs)
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
    """The devices, and how many trainings run at a time.

    Raises:
        StudyError: an empty device, or fewer than one training at a time.
    """
    devices = [device.strip() for device in arguments.device.split(",")]
    if not all(devices):
        raise StudyError(f"--device is {arguments.device!r}; expected cpu, or devices with commas between: 0,1.")
    if arguments.jobs is not None and arguments.jobs < 1:
        raise StudyError(f"--jobs is {arguments.jobs}; expected 1 or more.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return devices, arguments.jobs or (cores if devices == ["cpu"] else len(devices))


def _train(planner: Planner, arguments: argparse.Namespace, devices: list[str], jobs: int) -> int:
    from fgd_hooks.study.data import scan_labels
    from fgd_hooks.study.runner import Runner

    end_on_terminate()
    limit = arguments.max_minutes
    runner = Runner(
        jobs=jobs,
        devices=devices,
        deadline=None if limit is None else time.monotonic() + 60 * limit,
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


def _list(plan: Plan) -> None:
    from fgd_hooks.study.runner import in_progress

    for run in plan.runs:
        state = "done" if run.result() else "running" if in_progress(run.folder) else "to do"
        state += ", tested" if run.test() else ""
        print(f"{state:<14} {run.folder.name:<60} {run.epochs:>4} epochs")
    for text in plan.waiting:
        print(f"{'later':<14} {text}")


def _test(plan: Plan, device: str) -> None:
    """Measure every run on test that was not measured there before.

    Raises:
        StudyError: runs are not finished: whoever looks at test before could still choose by it.
    """
    from fgd_hooks.evaluation.evaluate import evaluate
    from fgd_hooks.study.processes import write_json
    from fgd_hooks.study.worker import job_of, measure

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
        found = measure(job_of(run, device.split(",")[0]), "test", evaluate)
        write_json(run.folder / TEST, {"measured": time.strftime("%Y-%m-%d"), "results": {"test": found}})
        print(f"{run.folder.name}: test mAP50-95 {100 * (found['map50_95'] or 0):.1f}")


def _table(folder: Path) -> int:
    from fgd_hooks.study.tables import write_tables

    print(write_tables(folder))
    return 0
