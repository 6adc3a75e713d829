"""What a callback says and refuses when it is attached, and what it puts on a trainer; nothing is trained here."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("ultralytics")

from fgd_hooks import FGDCallback
from fgd_hooks.errors import TaskError, TeacherError
from fgd_hooks.integrations.ultralytics.baseline import keep_columns
from fgd_hooks.integrations.ultralytics.callback import EVENTS
from fgd_hooks.integrations.ultralytics.session import AfterStep
from fgd_hooks.integrations.ultralytics.teacher import check_channels


@pytest.fixture
def yolo(student_yaml):
    from ultralytics import YOLO

    return YOLO(str(student_yaml))


def ours(model):
    return [each for handlers in model.callbacks.values() for each in handlers if hasattr(each, "callback")]


def test_a_second_callback_replaces_the_first(yolo, teacher_file, caplog):
    """A notebook's cell that runs again."""
    first = FGDCallback(teacher_file).attach(yolo)
    first.attach(yolo)
    assert "replaces" not in caplog.text, "the same one again"
    second = FGDCallback(teacher_file, weight=2).attach(yolo)
    assert caplog.text.count("the new one replaces it") == 1
    assert [handler.callback for handler in ours(yolo)] == [second] * len(EVENTS)
    assert "not attached" in repr(first)


def test_tuning_is_refused_while_attached(yolo, teacher_file):
    callback = FGDCallback(teacher_file).attach(yolo)
    with pytest.raises(TaskError, match=r"model\.tune.*not be distilled"):
        yolo.tune(data="coco8.yaml", iterations=1)
    callback.detach(yolo)
    assert "tune" not in vars(yolo)
    FGDCallback(teacher_file, weight=0).attach(yolo)
    assert "tune" not in vars(yolo), "a student alone may be tuned"


def test_teachers_without_weights(yolo, student_yaml):
    from ultralytics import YOLO

    with pytest.raises(TeacherError, match=r"YOLO object.*untrained teacher teaches nothing"):
        FGDCallback(YOLO("yolo26n.yaml")).attach(yolo)
    with pytest.raises(TeacherError, match="untrained teacher teaches nothing"):
        FGDCallback(str(student_yaml)).attach(yolo)


def test_a_smaller_teacher_and_one_of_the_same_file_are_told(teacher_file, caplog):
    from ultralytics import YOLO

    FGDCallback(teacher_file).attach(YOLO("yolo26s.yaml"))
    assert "smaller than the student" in caplog.text
    caplog.clear()
    FGDCallback(teacher_file).attach(YOLO(str(teacher_file)))
    assert "hold the same weights" in caplog.text
    assert "smaller" not in caplog.text


def test_images_of_other_channels_are_refused_in_one_line():
    from ultralytics.nn.tasks import DetectionModel

    grey, colour = (DetectionModel("yolo26n.yaml", ch=channels, nc=2, verbose=False) for channels in (1, 3))
    with pytest.raises(TeacherError, match=r"takes images of 3 channel\(s\), those of this training have 1"):
        check_channels(grey, [colour])
    check_channels(grey, [grey, nn.Conv2d(3, 3, 1)])


class Around(torch.optim.Optimizer):
    """Wraps another optimizer and calls no constructor of torch's, so that no step hook of torch's ever runs."""

    def __init__(self, inner):
        self.inner, self.param_groups, self.defaults, self.state = inner, inner.param_groups, {}, inner.state

    def step(self, closure=None):
        return self.inner.step()


@pytest.mark.parametrize("wrap", [lambda each: each, Around])
def test_adapters_step_after_any_optimizer(wrap):
    """Also with a scheduler, which puts a step of its own on the optimizer."""
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    optimizer = wrap(torch.optim.SGD([weight], lr=0.1))
    if isinstance(optimizer, torch.optim.SGD):
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    before, seen = optimizer.step, []
    handle = AfterStep(optimizer, lambda given: seen.append((given, float(weight))))
    optimizer.step()
    assert [given for given, _ in seen] == [optimizer]
    assert seen[0][1] == pytest.approx(0.9), "after the student's own step"
    handle.remove()
    optimizer.step()
    assert len(seen) == 1
    assert optimizer.step == before
    late = AfterStep(optimizer, seen.append)
    wrapped = optimizer.step = lambda own=optimizer.step: own()
    late.remove()
    optimizer.step()
    assert len(seen) == 1
    assert optimizer.step is wrapped, "what another has put there since stays"


@pytest.mark.parametrize(
    ("before", "losses", "after", "row"),
    [
        # distilled first, then without: zeros
        (
            "epoch,train/box,train/fgd_fg,val/box,val/fgd_fg,lr/pg0\n1,2,3,4,0,5\n",
            {"box": 6.0},
            "epoch,train/box,train/fgd_fg,val/box,val/fgd_fg,lr/pg0\n1,2,3,4,0,5\n",
            [6.0, 0.0],
        ),
        # the other way round: the rows that are there get columns
        (
            "epoch,train/box,val/box,lr/pg0\n1,2,4,5\n",
            {"box": 6.0, "fgd_fg": 7.0},
            "epoch,train/box,train/fgd_fg,val/box,val/fgd_fg,lr/pg0\n1,2,0,4,0,5\n",
            [6.0, 7.0],
        ),
        # another loss: both
        (
            "epoch,train/box,train/fgd_fg,val/box,val/fgd_fg\n1,2,3,4,0\n",
            {"box": 6.0, "fgd_cwd": 7.0},
            "epoch,train/box,train/fgd_fg,train/fgd_cwd,val/box,val/fgd_fg,val/fgd_cwd\n1,2,3,0,4,0,0\n",
            [6.0, 0.0, 7.0],
        ),
    ],
)
def test_the_log_of_a_resumed_training_keeps_one_width(tmp_path, before, losses, after, row):
    file = tmp_path / "results.csv"
    file.write_text(before)
    items = {name: torch.tensor(value) for name, value in losses.items()}
    trainer = SimpleNamespace(csv=file, resume=True, tloss=items, loss_items=items, metrics={"val/box": 1.0})
    keep_columns(trainer)
    assert file.read_text() == after
    columns = after.partition("\n")[0].split(",")
    for found in (trainer.tloss, trainer.loss_items):
        assert [float(value) for value in found.values()] == row
        assert [f"train/{name}" for name in found] == [name for name in columns if name.startswith("train/")]
    assert list(trainer.metrics) == [name for name in columns if name.startswith("val/")]
    keep_columns(trainer)
    assert file.read_text() == after, "once more changes nothing"


def test_the_log_of_a_new_training_is_left_alone(tmp_path):
    trainer = SimpleNamespace(csv=tmp_path / "results.csv", resume=False, tloss={"box": 1.0})
    keep_columns(trainer)
    assert trainer.tloss == {"box": 1.0}
    assert not trainer.csv.exists()
