import pytest
import torch

pytest.importorskip("ultralytics")

from fgd_hooks import FGDCallback
from fgd_hooks.cli.main import main
from fgd_hooks.errors import ConfigError, TaskError
from fgd_hooks.integrations.load_model import load_yolo
from fgd_hooks.integrations.ultralytics.compat import TASKS, check_task, images_counted, task_of
from tests.conftest import TINY, architecture

OTHERS = {"classify": "yolo26n-cls.yaml", "semantic": "yolo26n-sem.yaml", "depth": "yolo26n-depth.yaml"}


@pytest.mark.parametrize(("task", "name"), OTHERS.items())
def test_a_student_without_boxes_is_refused_when_attaching(teacher_file, task, name):
    from ultralytics import YOLO

    yolo = YOLO(name)
    with pytest.raises(TaskError, match=f"task '{task}'.*works for detect, segment, pose, obb"):
        FGDCallback(teacher_file).attach(yolo)
    assert not any(isinstance(getattr(h, "callback", None), FGDCallback) for e in yolo.callbacks.values() for h in e)


def test_a_trainer_is_refused_as_well():
    class Trainer:
        class args:
            task = "classify"

    with pytest.raises(TaskError, match="classify"):
        check_task(Trainer())


def test_the_command_line_says_it_in_one_line(teacher_file, data, capsys):
    keys = [f"teacher={teacher_file}", f"data={data}"]
    for command in ("train", "doctor"):
        assert main([command, *keys, "model=yolo26n-cls.yaml"]) == 2
        assert "task 'classify'" in capsys.readouterr().err
        assert main([command, *keys, "model=yolo26n.yaml", "fgd.boxes_from=masks"]) == 2
        assert "only a 'segment' training has masks" in capsys.readouterr().err


def test_boxes_from_masks_needs_a_segment_training(teacher_file, student_yaml, tmp_path):
    from ultralytics import YOLO

    with pytest.raises(TaskError, match="'detect'.*boxes_from=labels"):
        FGDCallback(teacher_file, boxes_from="masks").attach(YOLO(str(student_yaml)))
    FGDCallback(teacher_file, boxes_from="masks").attach(YOLO(str(architecture(tmp_path, "yolo26n-seg.yaml", TINY))))


def test_boxes_from_somewhere_else():
    with pytest.raises(
        ConfigError, match="boxes_from is 'polygons'.*'labels'.*'masks'|boxes_from is 'polygons'.*masks"
    ):
        FGDCallback("t.pt", boxes_from="polygons")


def test_the_task_of_models_and_modules():
    from ultralytics import YOLO

    names = {
        "detect": "yolo26n.yaml",
        "segment": "yolo11n-seg.yaml",
        "pose": "yolov8n-pose.yaml",
        "obb": "yolo26n-obb.yaml",
    }
    assert tuple(names) == TASKS
    for task, name in names.items():
        yolo = YOLO(name)
        del yolo.model.task
        assert task_of(yolo) == task_of(yolo.model) == task
    assert task_of(torch.nn.Conv2d(1, 1, 1)) is None


@pytest.fixture
def without_clip(monkeypatch):
    import importlib.util

    own = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "clip" else own(name, *rest))


@pytest.mark.parametrize(
    ("name", "warned"), [("yolov8s-world.yaml", True), ("yoloe-11s.yaml", True), ("yolo26n.yaml", False)]
)
def test_a_missing_text_encoder_is_named_when_attaching(name, warned, without_clip, teacher_file, tmp_path, caplog):
    from ultralytics.utils import LOGGER

    yolo = load_yolo(str(architecture(tmp_path, name, {"n" if "n." in name else "s": TINY["n"]})))
    LOGGER.addHandler(caplog.handler)
    try:
        FGDCallback(teacher_file).attach(yolo)
    finally:
        LOGGER.removeHandler(caplog.handler)
    assert ("'clip' is not installed" in caplog.text) == warned


def test_the_command_line_names_a_missing_text_encoder(monkeypatch, teacher_file, data, capsys):
    def missing(model):
        raise ModuleNotFoundError("No module named 'clip'", name="clip")

    monkeypatch.setattr("fgd_hooks.cli.train.load_yolo", missing)
    assert main(["train", f"teacher={teacher_file}", "model=yolov8s-world.yaml", f"data={data}"]) == 2
    assert "pip install git+https://github.com/ultralytics/CLIP.git" in capsys.readouterr().err


def loss_of(name, count):
    """Loss vector, items and divisor for so many copies of one image with a box."""
    from ultralytics.cfg import get_cfg

    torch.manual_seed(0)
    model = load_yolo(name).model.train()
    model.args, model.nc = get_cfg(), 80
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # else its statistics would tell the batches apart
    batch = {"img": torch.rand(1, 3, 64, 64).expand(count, -1, -1, -1), "cls": torch.zeros(count, 1)}
    batch |= {"bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]] * count), "batch_idx": torch.arange(float(count))}
    torch.manual_seed(0)
    loss, items = model(batch)
    return loss.detach().sum(), items, images_counted(model, len(batch["img"]))


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo12n.yaml"])
def test_a_yolo_loss_is_per_image_times_the_images(name):
    loss, items, count = loss_of(name, 3)
    assert float(loss / count) == pytest.approx(sum(float(item) for item in items.values()), rel=1e-4)
    assert count == 3


def test_the_loss_of_rtdetr_does_not_grow_with_the_images():
    (one, _, count), (three, _, _) = loss_of("yolov8n-rtdetr.yaml", 1), loss_of("yolov8n-rtdetr.yaml", 3)
    assert float(three) == pytest.approx(float(one), rel=0.2), "it draws noise, but nothing like a factor of 3"
    assert count == loss_of("yolov8n-rtdetr.yaml", 3)[2] == 1
