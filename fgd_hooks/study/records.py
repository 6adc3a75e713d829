"""What the finished runs of a study found, in a folder to keep: figures and logs, no weights and no paths.

``study.json`` says what was asked, ``runs.jsonl`` has a line for each run, ``curves.csv.gz`` the epochs of all logs.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fgd_hooks.errors import StudyError
from fgd_hooks.evaluation.arms import TAKEN
from fgd_hooks.study.plan import Plan, Run
from fgd_hooks.study.spec import StudySpec
from fgd_hooks.utils.files import write_json, write_whole

STUDY, RUNS, CURVES = "study.json", "runs.jsonl", "curves.csv.gz"

Curves = dict[str, list[dict[str, str]]]
"""Name of a run -> the lines of its log, each by the names of its columns."""


def read_study(folder: Path) -> dict[str, Any]:
    """What ``study.json`` says; empty where there is none."""
    file = folder / STUDY
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def read_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """The runs of ``runs.jsonl`` by name; empty where there is none."""
    found: dict[str, dict[str, Any]] = {}
    file = folder / RUNS
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else ()
    for number, line in enumerate(lines, 1):
        try:
            run = json.loads(line)
            name = run["name"]
        except (KeyError, ValueError, TypeError) as error:
            raise StudyError(f"{file}:{number} is no collected run: {error!r}; collect anew.") from error
        if name in found:
            raise StudyError(f"{file}:{number}: {name} is there twice; collect anew.")
        found[name] = run
    return found


def read_curves(folder: Path) -> Curves:
    """The logs of ``curves.csv.gz``; empty where there is none."""
    file = folder / CURVES
    curves: Curves = {}
    if file.is_file():
        with gzip.open(file, "rt", encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                curves.setdefault(row.pop("run"), []).append({key: cell for key, cell in row.items() if cell})
    return curves


def read_log(file: Path) -> list[dict[str, str]]:
    """The lines of a run's ``results.csv``."""
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def write_records(folder: Path, runs: Mapping[str, Mapping[str, Any]], curves: Curves) -> None:
    """Write ``runs.jsonl`` and ``curves.csv.gz``, the same bytes for the same content."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(run, separators=(",", ":")) + "\n" for _, run in sorted(runs.items())]
    write_whole(folder / RUNS, "".join(lines).encode())
    columns = dict.fromkeys(column for _, rows in sorted(curves.items()) for row in rows for column in row)
    text = io.StringIO()
    table = csv.DictWriter(text, ["run", *columns], lineterminator="\n")
    table.writeheader()
    table.writerows({"run": name, **row} for name, rows in sorted(curves.items()) for row in rows)
    if curves != read_curves(folder):  # another zlib would pack the same text into other bytes
        write_whole(folder / CURVES, gzip.compress(text.getvalue().encode(), 9, mtime=0))


def collect(spec: StudySpec, plan: Plan, folder: Path, whole: Plan) -> tuple[int, list[str]]:
    """Write the study and the log, settings and figures of every finished run.

    What lies there already and belongs to the study no more is removed: records of an arm, a data set or a seed that it
    has not, and of a run whose settings have changed since. Records of other runs stay, so that a study may be
    collected in parts.

    Returns:
        The number of finished runs, and the names of the records that were removed.
    """
    done = {_name(run): run for run in plan.runs if run.result() is not None}
    if not done:
        raise StudyError(f"No run of {spec.name} is finished; there is nothing to collect.")
    runs = {**read_runs(folder), **{name: record(run) for name, run in done.items()}}
    logs = {name: run.folder / "results.csv" for name, run in done.items()}
    curves = {**read_curves(folder), **{name: read_log(log) for name, log in logs.items() if log.is_file()}}
    removed = sorted(name for name, run in runs.items() if not _belongs(name, run, spec, whole))
    for name in removed:
        runs.pop(name)
        curves.pop(name, None)
    write_records(folder, runs, curves)
    counts = {name: entry.get("images") for name, entry in read_study(folder).get("data", {}).items()}
    counts |= {run.data: run.prepared.counts for run in whole.runs if run.arm not in TAKEN}
    study: dict[str, Any] = {key: getattr(spec, key) for key in ("name", "about", "baseline", "epochs", "seeds")}
    study["arms"] = list(spec.arms)
    study["compute"] = {name: arm.compute for name, arm in spec.arms.items() if arm.compute is not None}
    study["data"] = {
        name: {"images": counts.get(name)}
        | {key: value for key, value in asdict(data).items() if key in ("holdout", "fraction", "keep_steps")}
        for name, data in spec.data.items()
    }
    write_json(folder / STUDY, study)
    return len(done), removed


def _belongs(name: str, kept: Mapping[str, Any], spec: StudySpec, whole: Plan) -> bool:
    """Whether a record is one of the study as it is now."""
    run = next((run for run in whole.runs if _name(run) == name), None)
    if kept.get("data") in set(spec.data) - {run.data for run in whole.runs}:  # not looked at this time
        return True
    if run is None:  # an arm of another's compute is planned when that is finished
        later = [arm for arm in spec.arms if spec.arms[arm].compute is not None]
        return name in {f"{data}-{arm}-s{seed}" for data in spec.data for arm in later for seed in spec.seeds}
    scale = list(run.scale) if run.scale else None
    now = {"student": run.student, "epochs": run.epochs, "scale": scale, "settings": run.settings, "fgd": run.fgd}
    return all(kept.get(key) == value for key, value in now.items())


def _name(run: Run) -> str:
    return f"{run.data}-{run.arm}-s{run.seed}"


def record(run: Run) -> dict[str, Any]:
    """What is kept of a run, under the names that the plan gives it (a run that is shared may have been made by another
    study, under another name)."""
    result = run.result() or {}
    tested = run.test()
    results = {**result.get("results", {}), **(tested["results"] if tested else {})}
    named: dict[str, Any] = {"name": _name(run), "data": run.data, "arm": run.arm, "kind": run.kind}
    named |= {"student": run.student, "images": run.prepared.counts, "needs": [need.name for need in run.needs]}
    kept = {key: value for key, value in result.items() if key not in ("results", *named)}
    extra = {"test_measured": tested["measured"]} if tested else {}
    return {**named, **kept, **extra, "results": results}
