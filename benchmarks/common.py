"""What the benchmarks share: the machine, interleaved timing, peak memory, tables and files."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fgd_hooks.evaluation.reporting import Table
from fgd_hooks.study.worker import processor

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "benchmarks"


def machine() -> dict[str, Any]:
    """Processor, versions, threads and the load beside this process."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("ultralytics", "torchvision"):
        try:
            versions[package] = __import__(package).__version__
        except ImportError:
            versions[package] = "not installed"
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        **versions,
    }


def interleave(arms: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Milliseconds of the process's CPU time for each arm and round.

    All arms run once per round, so that whatever else the machine does meets all of them; every round starts with
    another arm. CPU time leaves out what other processes take; with one thread it is the time on an idle machine.
    """
    names = list(arms)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = time.process_time()
            arms[name]()
            if number >= warmup:
                times[name].append(1e3 * (time.process_time() - start))
    return times


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and minimum, in milliseconds."""
    ordered = sorted(times)
    low, _, high = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else (ordered[0],) * 3
    return {
        "median_ms": round(statistics.median(ordered), 2),
        "quartiles_ms": [round(low, 2), round(high, 2)],  # type: ignore[dict-item]
        "min_ms": round(ordered[0], 2),
        "repeats": len(ordered),
    }


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that ``run`` holds at once above what was there, by PyTorch's allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def save(name: str, rows: list[dict[str, Any]], **more: Any) -> Path:
    """Write results/benchmarks/<name>.json."""
    file = RESULTS / f"{name}.json"
    content = {"machine": machine(), **more, "rows": rows}
    file.write_text(json.dumps(content, indent=1) + "\n")
    return file


def show(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print some columns of the rows as a Markdown table."""
    table = Table(columns, [[str(row.get(column, "")) for column in columns] for row in rows])
    print("", title, "", *table.markdown(), sep="\n", flush=True)
