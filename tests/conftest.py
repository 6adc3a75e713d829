"""A tiny data set, tiny YOLO files and one tiny trained teacher, made once for all tests that train."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("YOLO_AUTOINSTALL", "false")  # a test never installs anything
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors, which more threads only slow down

import hypothesis
import pytest
import torch
import yaml

# no test depends on how fast a machine is, not even the drawing of its inputs
hypothesis.settings.register_profile("fgd", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("fgd")

torch.set_num_threads(1)

# What a part of the tests needs besides pytest and the core; where a package is missing, that part is left out.
NEEDS = {
    "cli": "ultralytics",
    "contracts/test_leaks.py": "psutil",
    "diagnostics/test_plots.py": "matplotlib",
    "evaluation": "pycocotools",
    "integrations/ultralytics": "ultralytics",
    "losses/test_compiled.py": "numpy",
    "losses/test_golden.py": "numpy",
    "results": "matplotlib",
    "study": "ultralytics",
    "taps/test_levels.py": "numpy",
    "trainers": "torchvision pycocotools",
    "utils/test_checkpoint.py": "safetensors numpy",
    "utils/test_preserve.py": "numpy",
}
MISSING = {
    part: missing
    for part, packages in NEEDS.items()
    if (missing := [package for package in packages.split() if importlib.util.find_spec(package) is None])
}


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if collection_path.relative_to(Path(__file__).parent).as_posix() in MISSING else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for part, missing in MISSING.items():
        terminalreporter.write_line(f"left out: tests/{part} (without {', '.join(missing)})")


TINY = {"n": [0.33, 0.0625, 1024]}  # scale, depth and width: a 16th of the layers' nominal width
WIDE = {"n": [0.33, 0.125, 1024]}

SETTINGS = {
    "imgsz": 64,
    "batch": 4,
    "nbs": 4,
    "warmup_epochs": 0,
    "optimizer": "AdamW",
    "lr0": 1e-3,
    "mosaic": 0.0,
    "amp": False,
    "plots": False,
    "val": False,
    "workers": 0,
    "device": "cpu",
    "verbose": False,
    "exist_ok": True,
    "pretrained": False,
}


def architecture(folder: Path, name: str, scales: dict, **changes: object) -> Path:
    """Write Ultralytics' own architecture ``name`` in another width; returns the yaml file."""
    from ultralytics.nn.tasks import yaml_model_load

    content = yaml_model_load(name)
    for key in ("yaml_file", "scale"):
        content.pop(key, None)
    content.update(scales=scales, **changes)
    file = folder / f"tiny_{name}"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("ultralytics")
    return tmp_path_factory.mktemp("yolo")


@pytest.fixture(scope="session")
def data(workplace: Path) -> Path:
    from fgd_hooks.study.scenes import SceneSettings, make_dataset

    return make_dataset(workplace / "scenes", SceneSettings(train=20, val=4, size=64))


@pytest.fixture(scope="session")
def student_yaml(workplace: Path) -> Path:
    folder = workplace / "student"
    folder.mkdir()
    return architecture(folder, "yolo26n.yaml", TINY)


@pytest.fixture(scope="session")
def teacher_file(workplace: Path, data: Path) -> Path:
    """A yolo26 twice as wide as the student, trained for two epochs, so that its batch statistics are real."""
    from ultralytics import YOLO

    folder = workplace / "teacher"
    folder.mkdir()
    model = YOLO(str(architecture(folder, "yolo26n.yaml", WIDE)))
    model.train(data=str(data), epochs=2, project=str(workplace), name="teacher_run", seed=3, **SETTINGS)
    return workplace / "teacher_run" / "weights" / "last.pt"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than a tiny training; the tests of the pictures switch it on again."""
    if "ultralytics" in sys.modules:
        monkeypatch.setattr("fgd_hooks.integrations.ultralytics.monitor.PICTURED", 0)


@pytest.fixture
def train(data: Path, student_yaml: Path, tmp_path: Path):
    """``train(callback, **settings)``: train the tiny student; returns the YOLO object, its trainer inside."""
    from ultralytics import YOLO

    def run(callback=None, *, model=None, name="run", hooks=(), **settings):
        yolo = model or YOLO(str(student_yaml))
        if callback is not None:
            callback.attach(yolo)
        for event, function in hooks:
            yolo.add_callback(event, function)
        yolo.train(**{**SETTINGS, "data": str(data), "project": str(tmp_path), "name": name, "epochs": 1, **settings})
        return yolo

    return run
