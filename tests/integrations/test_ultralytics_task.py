import pytest
import torch

pytest.importorskip("ultralytics")

from fgd_hooks import FGDCallback
from fgd_hooks.cli import main
from fgd_hooks.integrations.ultralytics_task import TASKS, TaskError, check_task, images_counted, task_of
from fgd_hooks.modelnames import load_yolo
from tests.conftest import TINY, architecture

OTHERS = {"classify": "yolo26n-cls.yaml", "semantic": "yolo26n-sem.yaml", "depth": "yolo26n-depth.yaml"}


@pytest.mark.parametrize(("task", "name"), OTHERS.items())
def test_a_student_without_boxes_is_refused_when_attaching(teacher_file, task, name):
    from ultralytics import YOLO

    yolo = YOLO(name)
    with pytest.raises(TaskError, match=f"task '{task}'.*works for detect, segment, pose, obb"):
        FGDCallback(teacher_file).attach(yolo)
    assert not any(isinstance(getattr(h, "__self__", None), FGDCallback) for e in yolo.callbacks.values() for h in e)


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
    return loss.detach().sum(), items, images_counted(model, batch["img"])


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo12n.yaml"])
def test_a_yolo_loss_is_per_image_times_the_images(name):
    loss, items, count = loss_of(name, 3)
    assert float(loss / count) == pytest.approx(sum(float(item) for item in items.values()), rel=1e-4)
    assert count == 3


def test_the_loss_of_rtdetr_does_not_grow_with_the_images():
    (one, _, count), (three, _, _) = loss_of("yolov8n-rtdetr.yaml", 1), loss_of("yolov8n-rtdetr.yaml", 3)
    assert float(three) == pytest.approx(float(one), rel=0.2), "it draws noise, but nothing like a factor of 3"
    assert count == loss_of("yolov8n-rtdetr.yaml", 3)[2] == 1
