"""Copy what the finished runs of a study found into a folder to keep: logs and numbers, no weights and no paths."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fgd_hooks.errors import StudyError
from fgd_hooks.study.plan import Plan, Run
from fgd_hooks.study.processes import read_json, write_json
from fgd_hooks.study.spec import TAKEN, StudySpec

STUDY = "study.json"


def collect(spec: StudySpec, plan: Plan, folder: Path, whole: Plan) -> tuple[int, list[str]]:
    """Write ``study.json`` and, for every finished run, its log (csv) and its settings and figures (json).

    What lies there already and belongs to the study no more is removed: records of an arm, a data set or a seed that it
    has not, and of a run whose settings have changed since. Records of other runs stay, so that a study may be
    collected in parts.

    Args:
        spec: the study.
        plan: the runs to collect.
        folder: where to.
        whole: all runs of the study on the data sets that are collected.

    Returns:
        The number of finished runs, and the names of the records that were removed.

    Raises:
        StudyError: no run is finished.
    """
    done = [run for run in plan.runs if run.result() is not None]
    if not done:
        raise StudyError(f"No run of {spec.name} is finished; there is nothing to collect.")
    folder.mkdir(parents=True, exist_ok=True)
    for run in done:
        log = run.folder / "results.csv"
        if log.is_file():
            shutil.copyfile(log, folder / f"{_name(run)}.csv")
        write_json(folder / f"{_name(run)}.json", record(run))
    earlier = read_json(folder / STUDY).get("data", {}) if (folder / STUDY).is_file() else {}
    counts = {name: entry.get("images") for name, entry in earlier.items()}
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
    return len(done), _remove_others(spec, folder, whole)


def _remove_others(spec: StudySpec, folder: Path, whole: Plan) -> list[str]:
    """Remove what another version of the study has left; returns the names."""
    planned = {_name(run): run for run in whole.runs}
    others = set(spec.data) - {run.data for run in whole.runs}  # not looked at this time
    computed = [name for name, arm in spec.arms.items() if arm.compute is not None]  # planned when others are finished
    later = {f"{data}-{arm}-s{seed}" for data in spec.data for arm in computed for seed in spec.seeds}
    removed = []
    for file in sorted(folder.glob("*.json")):
        run = planned.get(file.stem)
        if file.name == STUDY or (run is None and file.stem in later):
            continue
        found = read_json(file)
        if found.get("data") in others:
            continue
        if run is None or any(found.get(key) != value for key, value in _settings(run).items()):
            file.unlink()
            file.with_suffix(".csv").unlink(missing_ok=True)
            removed.append(file.stem)
    return removed


def _settings(run: Run) -> dict[str, Any]:
    """What a record has to agree in with the plan."""
    scale = list(run.scale) if run.scale else None
    return {"student": run.student, "epochs": run.epochs, "scale": scale, "settings": run.settings, "fgd": run.fgd}


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
