"""What a YOLO training leaves behind about its distillation."""

import csv

import pytest

pytest.importorskip("ultralytics")

from fgd_hooks import FGDCallback, load_config
from fgd_hooks.integrations.ultralytics.settings import named_config
from fgd_hooks.utils.checkpoint import LAST_CHECKPOINT
from tests.diagnostics.test_tensorboard import hparams_of, layout_of, read


@pytest.mark.slow
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


def test_a_baseline_lies_in_the_charts_of_a_distilled_run(train, teacher_file):
    """The task's loss and the validation have the same tags and the same size; each chart says what it shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    zero = train(FGDCallback(teacher_file, weight=0, log_interval=1), name="zero", val=True)
    folder = zero.trainer.save_dir
    assert not (folder / "fgd.yaml").exists()
    events = EventAccumulator(str(folder)).Reload()
    distilled = train(FGDCallback(teacher_file, log_interval=1, inherit=None), name="distilled", val=True)
    other = EventAccumulator(str(distilled.trainer.save_dir)).Reload()
    losses = [[event.value for event in each.Scalars("fgd/task_loss")] for each in (events, other)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5), "the first step of both sees the same student"
    assert len(losses[0]) == len(losses[1]) == 5
    for tag in ("fgd/task_loss", "fgd/mAP50-95", "final/mAP50-95", "val/box_loss", "train/box_loss"):
        assert tag in events.Tags()["scalars"], tag
        assert events.SummaryMetadata(tag).summary_description.endswith((".", "better.")), tag
    assert hparams_of(events)["fgd.weight"] == 0


@pytest.mark.slow
def test_a_baseline_in_the_folder_of_a_distilled_run_removes_what_that_left(train, teacher_file):
    folder = train(FGDCallback(teacher_file), name="same").trainer.save_dir
    assert (folder / "fgd.yaml").exists()
    train(FGDCallback(teacher_file, weight=0), name="same", exist_ok=True)
    assert not (folder / "fgd.yaml").exists()
    assert not (folder / "weights" / LAST_CHECKPOINT).exists()
