"""Copy what the finished runs of a study found into a folder to keep: logs and numbers, no weights and no paths."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fgd_hooks.childprocess import write_json
from fgd_hooks.study.plan import Plan, Run
from fgd_hooks.study.spec import StudyError, StudySpec

STUDY = "study.json"


def collect(spec: StudySpec, plan: Plan, folder: Path) -> int:
    """Write ``study.json`` and, for every finished run, its log (csv) and its settings and figures (json).

    Returns:
        The number of finished runs.

    Raises:
        StudyError: no run is finished.
    """
    done = [run for run in plan.runs if run.result() is not None]
    if not done:
        raise StudyError(f"No run of {spec.name} is finished; there is nothing to collect.")
    folder.mkdir(parents=True, exist_ok=True)
    for run in done:
        name = f"{run.data}-{run.arm}-s{run.seed}"
        log = run.folder / "results.csv"
        if log.is_file():
            shutil.copyfile(log, folder / f"{name}.csv")
        write_json(folder / f"{name}.json", record(run))
    study: dict[str, Any] = {key: getattr(spec, key) for key in ("name", "about", "baseline", "epochs", "seeds")}
    study["arms"] = list(spec.arms)
    study["data"] = {
        name: {"images": next((run.prepared.counts for run in done if run.data == name), None)}
        | {key: value for key, value in asdict(data).items() if key in ("holdout", "fraction", "keep_steps")}
        for name, data in spec.data.items()
    }
    write_json(folder / STUDY, study)
    return len(done)


def record(run: Run) -> dict[str, Any]:
    """What is kept of a run, under the names that the plan gives it (a run that is shared may have been made by another
    study, under another name)."""
    result = run.result() or {}
    tested = run.test()
    results = {**result.get("results", {}), **(tested["results"] if tested else {})}
    named = {"name": f"{run.data}-{run.arm}-s{run.seed}", "data": run.data, "arm": run.arm, "kind": run.kind}
    kept = {key: value for key, value in result.items() if key not in ("results", *named)}
    extra = {"test_measured": tested["measured"]} if tested else {}
    return {**named, **kept, **extra, "results": results}
