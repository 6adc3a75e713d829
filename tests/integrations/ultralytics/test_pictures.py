import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("ultralytics")

from fgd_hooks import FGDCallback
from fgd_hooks.diagnostics.attention import attention_sheets
from fgd_hooks.integrations.ultralytics import monitor as ultralytics_pictures
from fgd_hooks.integrations.ultralytics.monitor import WATCHED, AttentionWatch, fixed_batches
from fgd_hooks.schedule import Clock
from fgd_hooks.utils.checkpoint import LAST_CHECKPOINT, read_checkpoint


@pytest.fixture(autouse=True)
def one_picture(no_pictures, monkeypatch):
    monkeypatch.setattr(ultralytics_pictures, "PICTURED", 1)


def events(yolo):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(yolo.trainer.save_dir), size_guidance={"images": 0})
    found.Reload()
    return found


def tensors(value, prefix=""):
    """Every tensor of nested containers, by its place."""
    if isinstance(value, torch.Tensor):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {place: each for key, item in items for place, each in tensors(item, f"{prefix}/{key}").items()}


@pytest.mark.slow
def test_pictures_change_nothing(train, teacher_file, monkeypatch):
    """Weights, moving average, adapters, optimizers and random states are bit-equal with everything on and off."""
    found = {}

    def random_states(trainer):
        states.append((random.random(), np.random.rand(), torch.rand(1).item()))

    for name in ("on", "off"):
        states = []
        if name == "off":
            monkeypatch.setattr(ultralytics_pictures.AttentionWatch, "write", lambda *args, **kwargs: None)
        yolo = train(
            FGDCallback(teacher_file, image_interval=1),
            name=name,
            epochs=2,
            val=True,
            mosaic=1.0,
            close_mosaic=0,
            hooks=[("on_train_epoch_start", random_states), ("on_fit_epoch_end", random_states)],
        )
        trainer = yolo.trainer
        side = read_checkpoint(trainer.wdir / LAST_CHECKPOINT)
        found[name] = {
            **tensors(trainer.model.state_dict(), "model"),
            **tensors(trainer.ema.ema.state_dict(), "ema"),
            **tensors(trainer.optimizer.state_dict(), "optimizer"),
            **tensors(side, "side"),
        }
        found[f"{name} states"] = states
        found[f"{name} pictures"] = len(events(yolo).Tags()["images"])
    assert (found["on pictures"], found["off pictures"]) == (3, 0)
    assert found["on states"] == found["off states"]
    assert list(found["on"]) == list(found["off"])
    assert len(found["on"]) > 500
    assert [place for place, value in found["on"].items() if not torch.equal(value, found["off"][place])] == []


@pytest.mark.slow
def test_distance_of_each_epoch_and_pictures_now_and_then(train, teacher_file, monkeypatch):
    seen = []
    monkeypatch.setattr(ultralytics_pictures, "PICTURED", 2)
    monkeypatch.setattr("fgd_hooks.diagnostics.plots.sheet_pixels", lambda sheet: np.zeros((4, 6, 3), dtype=np.uint8))

    def look(trainer):
        """The distance, from the models as they are and the definition."""
        if trainer.epoch != 1:
            return
        distiller = callback.distiller(trainer)
        batches = fixed_batches(trainer.test_loader.dataset, WATCHED)
        for batch in batches:
            sheets = attention_sheets(distiller, trainer.ema.ema, batch["img"] / 255, [torch.zeros(0, 4)])
            seen.append([float((s.student_spatial - s.teacher_spatial).abs().mean()) for s in sheets])

    callback = FGDCallback(teacher_file, image_interval=3)
    yolo = train(callback, epochs=5, val=True, hooks=[("on_fit_epoch_end", look)])
    found = events(yolo)
    for level, expected in zip(("P3", "P4", "P5"), np.mean(seen, axis=0), strict=True):
        points = found.Scalars(f"fgd/attention_distance/{level}")
        assert [point.step for point in points] == [1, 2, 3, 4, 5], "one for each epoch, none for the final validation"
        assert all(0 < point.value < 2 for point in points)
        assert points[1].value == pytest.approx(expected, rel=1e-5)
    tags = sorted(tag for tag in found.Tags()["images"] if tag.startswith("fgd/attention/"))
    assert tags == [f"fgd/attention/validation image {n}/{level}" for n in (1, 2) for level in ("P3", "P4", "P5")]
    assert [image.step for image in found.Images(tags[0])] == [1, 4, 5], "the first, every third, the last"


@pytest.mark.parametrize(
    ("steps", "distances", "pictures"),
    [
        (1, [1, 51, 101, 120], [1, 120]),  # steps per epoch: the last epoch has both in any case
        (25, [1, *range(3, 121, 2), 120], [1, 21, 41, 61, 81, 101, 120]),
        (2000, [*range(1, 121)], [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 101, 111, 120]),
    ],
)
def test_short_epochs_are_watched_and_drawn_less_often(monkeypatch, steps, distances, pictures):
    """At most one distance in 50 steps, and one set of pictures in 10 epochs and 500 steps."""
    clock, watched, drawn = Clock(), [], []
    watch = AttentionWatch(SimpleNamespace(clock=clock, pairs=[]), None, None, None)
    monkeypatch.setattr(watch, "sheets", lambda student: [])
    monkeypatch.setattr(ultralytics_pictures, "write_scalars", lambda writer, scalars, epoch: watched.append(epoch))
    monkeypatch.setattr(ultralytics_pictures, "write_sheets", lambda writer, sheets, epoch: drawn.append(epoch))
    for epoch in range(120):
        clock.step += steps
        watch.write(None, None, epoch, last=epoch == 119)
    assert (watched, drawn) == (distances, pictures)


@pytest.mark.parametrize(
    "settings", [pytest.param({"image_interval": 0}, marks=pytest.mark.slow), {"log_interval": 0}], ids=str
)
def test_none(train, teacher_file, settings):
    yolo = train(FGDCallback(teacher_file, **settings))
    tags = events(yolo).Tags()
    assert tags["images"] == []
    assert ("fgd/attention_distance/P3" in tags["scalars"]) == ("image_interval" in settings)


@pytest.mark.slow
def test_a_failure_is_said_once_and_the_training_goes_on(train, teacher_file, monkeypatch, caplog):
    from ultralytics.utils import LOGGER

    def fail(*args, **kwargs):
        raise RuntimeError("no paint left")

    monkeypatch.setattr(ultralytics_pictures, "attention_sheets", fail)
    LOGGER.addHandler(caplog.handler)
    try:
        yolo = train(FGDCallback(teacher_file), epochs=2)
    finally:
        LOGGER.removeHandler(caplog.handler)
    assert yolo.trainer.epoch == 1
    assert caplog.text.count("no paint left") == 1


def test_images_with_boxes_come_first_and_sizes_may_differ():
    class Dataset:
        labels = tuple({"bboxes": [0] * (number % 3 == 0)} for number in range(12))

        def __getitem__(self, number):
            return number

        def __len__(self):
            return 12

        collate_fn = staticmethod(list)

    assert fixed_batches(Dataset(), 2) == [[0], [6]]
    assert fixed_batches(Dataset(), 9) == [[0], [3], [6], [9]]
    Dataset.labels = ({"bboxes": []},) * 12
    assert fixed_batches(Dataset(), 3) == [[0], [4], [8]]
