"""What a YOLO training leaves behind about its distillation."""

import csv

import pytest

pytest.importorskip("ultralytics")

from fgd_hooks import FGDCallback, load_config
from fgd_hooks.integrations.ultralytics.settings import named_config
from tests.diagnostics.test_tensorboard import hparams_of, layout_of, read


def test_a_run_holds_its_settings_its_page_and_its_row(train, teacher_file, student_yaml):
    callback = FGDCallback(teacher_file, interval=2, balance={"ratio": 0.5}, schedule={"stop": None})
    yolo = train(callback, epochs=2, val=True, seed=5)
    folder = yolo.trainer.save_dir

    settings = load_config(folder / "fgd.yaml")
    assert settings.teacher.name == str(teacher_file)
    assert named_config(callback.config, teacher_file) == settings, "the file repeats the run"

    events = read(folder)
    assert "P5: parts of the loss" in layout_of(events)["Levels"]
    row = hparams_of(events)
    expected = {
        "fgd.teacher": "last.pt",
        "fgd.interval": 2,
        "fgd.balance.ratio": 0.5,
        "fgd.schedule.stop": "never",
        "model": student_yaml.name,
        "epochs": 2,
        "batch": 4,
        "imgsz": 64,
        "lr0": 1e-3,
        "seed": 5,
    }
    assert {key: row[key] for key in expected} == expected
    assert not [path for path in folder.iterdir() if path.is_dir() and path.name != "weights"]
    with open(folder / "results.csv") as file:
        last = list(csv.DictReader(file))[-1]
    for tag, column in (("final/mAP50-95", "metrics/mAP50-95(B)"), ("final/mAP50", "metrics/mAP50(B)")):
        (entry,) = events.Scalars(tag)
        assert entry.step == 2
        assert entry.value == pytest.approx(float(last[column]), abs=1e-5)
    assert [event.step for event in events.Scalars("fgd/mAP50-95")] == [1, 2]
    (best,) = events.Scalars("best/mAP50-95")
    assert best.value == pytest.approx(yolo.trainer.metrics["metrics/mAP50-95(B)"])


def test_the_stock_run_is_left_alone(train, teacher_file):
    yolo = train(FGDCallback(teacher_file, weight=0))
    assert not (yolo.trainer.save_dir / "fgd.yaml").exists()
