"""The keys of the repository's studies stay what they are: a run is found again by its key, whatever else changes.

A key that changes means that every run of the study would be trained again. What shapes a key and may change without
the study, such as a default of the distillation, is a decision: change it here with it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from fgd_hooks.study.data import Prepared
from fgd_hooks.study.plan import Planner
from fgd_hooks.study.spec import load_study

STUDIES = Path(__file__).parents[2] / "configs" / "studies"
PINNED = json.loads(Path(__file__).with_name("keys.json").read_text())


def keys(study: str, out: Path) -> dict[str, str]:
    """Data set, arm and seed -> key, of all runs whose epochs are given, on images that are not looked at."""
    file = STUDIES / f"{study}.yaml"
    planner = Planner(load_study(file), file, out)
    planner.prepared = lambda name, whole=False: Prepared(Path("data.yaml"), f"{name} {whole}", {})  # type: ignore
    return {f"{run.data} {run.arm} {run.seed}": run.key for run in planner.plan().runs}


def digest(found: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


@pytest.mark.parametrize("study", PINNED["studies"])
def test_keys_of_a_study(study, tmp_path):
    assert digest(keys(study, tmp_path)) == PINNED["studies"][study]


def test_keys_of_single_runs(tmp_path):
    found = keys("scenes", tmp_path)
    assert {name: found[name] for name in PINNED["scenes"]} == PINNED["scenes"]


def test_every_study_is_pinned():
    assert {file.stem for file in STUDIES.glob("*.yaml")} == set(PINNED["studies"])
