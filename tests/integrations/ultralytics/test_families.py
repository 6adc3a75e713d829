"""Each family of Ultralytics as student and as teacher, through a real training of a few steps."""

import csv
import math
import zipfile

import pytest
import torch

pytest.importorskip("ultralytics")

from fgd_hooks import FGDCallback
from fgd_hooks.config import load_config
from fgd_hooks.diagnostics.report import Finding
from fgd_hooks.integrations.load_model import load_yolo
from fgd_hooks.integrations.ultralytics import doctor as ultralytics_doctor
from fgd_hooks.integrations.ultralytics.compat import task_of
from fgd_hooks.integrations.ultralytics.session import TrainingSession
from fgd_hooks.integrations.ultralytics.teacher import score_taps
from tests.conftest import TINY, architecture
from tests.helpers.yolo_data import make

PARTS = ["fgd_fg", "fgd_bg", "fgd_att", "fgd_glob"]
P3_TO_P5 = ["P3", "P4", "P5"]


@pytest.fixture(autouse=True)
def text_encoder(monkeypatch):
    """A stand-in for CLIP, which needs a download: the same random unit vector for the same word."""
    from ultralytics.nn import tasks

    def embed(self, text, batch=80, cache_clip_model=False, without_reprta=False):
        rows = [torch.randn(512, generator=torch.Generator().manual_seed(sum(map(ord, word)))) for word in text]
        found = torch.nn.functional.normalize(torch.stack(rows)[None], dim=-1)
        plain = without_reprta or isinstance(self, tasks.WorldModel)
        return found if plain else self.model[-1].get_tpe(found).detach()

    monkeypatch.setattr(tasks.WorldModel, "get_text_pe", embed)
    monkeypatch.setattr(tasks.YOLOEModel, "get_text_pe", embed)


@pytest.fixture(scope="module")
def task_data(tmp_path_factory):
    made = {}

    def get(task):
        if task not in made:
            made[task] = make(tmp_path_factory.mktemp("data") / task, task)
        return made[task]

    return get


@pytest.fixture
def teacher_of(tmp_path):
    """``teacher_of("yolov8n.yaml", 64)``: a weights file with natural batch statistics, so that its features speak."""

    def save(name, size=64):
        torch.manual_seed(1)
        yolo = load_yolo(str(name))
        yolo.model.train()
        with torch.no_grad():
            for _ in range(3):
                yolo.model(torch.rand(4, 3, size, size))
        yolo.save(str(tmp_path / "teacher.pt"))
        return tmp_path / "teacher.pt"

    return save


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def distil(train, task_data, monkeypatch):
    """``distil(student, teacher, levels, size)``: train three steps and check all that must hold for every family.

    The first two steps measure the balance; the third distils, and there the gradient of the added loss alone is looked
    for in the layers that feed the student's head.
    """

    def run(student, teacher, levels, size=64, config=None, final_eval=False, **settings):
        seen = {"gradients": []}
        own = TrainingSession.add_loss_of

        def add_loss_of(self, batch, output):
            loss, items = own(self, batch, output)
            seen["levels"] = self.distiller.level_names
            seen["ratios"] = self.distiller.balance.ratios
            if not self.distilled.measured:
                for index in self.model.model[-1].f:
                    parameters = [p for p in self.model.model[index].parameters() if p.requires_grad]
                    found = torch.autograd.grad(loss[-1], parameters, retain_graph=True, allow_unused=True)
                    seen["gradients"].append(sum(float(g.norm()) for g in found if g is not None))
            return loss, items

        monkeypatch.setattr(TrainingSession, "add_loss_of", add_loss_of)
        if not final_eval:
            monkeypatch.setattr("ultralytics.engine.trainer.BaseTrainer.final_eval", lambda self: None)
        yolo = load_yolo(str(student))
        data = task_data(task_of(yolo))
        train(FGDCallback(teacher, config=config), model=yolo, data=str(data), imgsz=size, **settings)
        assert seen["levels"] == levels
        assert bool((torch.isfinite(seen["ratios"]) & (seen["ratios"] > 0)).all())
        # a level that the teacher lacks feeds perhaps none that is taught
        assert sum(0 < norm < math.inf for norm in seen["gradients"]) >= len(levels), seen["gradients"]
        assert all(math.isfinite(norm) for norm in seen["gradients"])
        with open(yolo.trainer.csv) as file:
            row = list(csv.DictReader(file))[-1]
        assert all(0 < float(row[f"train/{part}"]) < math.inf for part in PARTS), row
        assert hooks(yolo.trainer.model) == hooks(yolo.trainer.ema.ema) == 0
        with zipfile.ZipFile(yolo.trainer.last) as archive:
            assert not any(b"fgd_hooks" in archive.read(name) for name in archive.namelist() if name.endswith(".pkl"))
        assert hooks(load_yolo(str(yolo.trainer.last)).model) == 0
        return yolo

    return run


def tiny(folder, name, scale="n", **changes):
    return architecture(folder, name, {scale: TINY["n"]}, **changes)


@pytest.fixture
def rtdetr(tmp_path):
    """An RT-DETR with the neck of a tiny YOLOv8, 20 queries and one decoder layer."""
    from ultralytics.nn.tasks import yaml_model_load

    *neck, decoder = yaml_model_load("yolov8n-rtdetr.yaml")["head"]
    width, queries, points, heads, layers = 32, 20, 4, 4, 1
    decoder[3] = ["nc", width, queries, points, heads, layers]
    return tiny(tmp_path, "yolov8n-rtdetr.yaml", head=[*neck, decoder])


# a few, small enough for every run


def test_rtdetr_learns(distil, teacher_file, rtdetr):
    yolo = distil(rtdetr, teacher_file, P3_TO_P5)
    assert type(yolo).__name__ == "RTDETR"
    assert type(yolo.trainer).__name__ == "RTDETRTrainer"


def test_rtdetr_teaches(distil, teacher_of, student_yaml, rtdetr):
    distil(student_yaml, teacher_of(rtdetr), P3_TO_P5)


def test_yolo_world_learns(distil, teacher_file, tmp_path):
    yolo = distil(tiny(tmp_path, "yolov8s-world.yaml", "s"), teacher_file, P3_TO_P5)
    assert type(yolo).__name__ == "YOLOWorld"


def test_yoloe_learns(distil, teacher_file, tmp_path):
    yolo = distil(tiny(tmp_path, "yoloe-11s.yaml", "s"), teacher_file, P3_TO_P5)
    assert type(yolo).__name__ == "YOLOE"


@pytest.mark.parametrize("task", ["segment", "pose", "obb"])
def test_a_detector_teaches_other_tasks(distil, teacher_file, tmp_path, task):
    name = {"segment": "yolo26n-seg.yaml", "pose": "yolo26n-pose.yaml", "obb": "yolo26n-obb.yaml"}[task]
    settings = {"boxes_from": "masks"} if task == "segment" else {}
    yolo = distil(tiny(tmp_path, name), teacher_file, P3_TO_P5, config=settings)
    assert yolo.task == task


# all of them, as Ultralytics ships them

SWEEP = [
    ("yolov3-tiny.yaml", "yolo26n.yaml", ["P4", "P5"]),
    ("yolov3.yaml", "yolo26n.yaml", P3_TO_P5),
    ("yolov5n.yaml", "yolo26n.yaml", P3_TO_P5),
    ("yolov5n-p6.yaml", "yolov8n-p6.yaml", [*P3_TO_P5, "P6"]),
    ("yolov6n.yaml", "yolo26n.yaml", P3_TO_P5),
    ("yolov8n.yaml", "yolov9t.yaml", P3_TO_P5),
    ("yolov8n-ghost.yaml", "yolov3-tiny.yaml", ["P4", "P5"]),
    ("yolov8n-p2.yaml", "yolo26n-p2.yaml", ["P2", *P3_TO_P5]),
    ("yolov8n-p6.yaml", "yolo26n-p6.yaml", [*P3_TO_P5, "P6"]),
    ("yolov9t.yaml", "yolov5n.yaml", P3_TO_P5),
    ("yolov10n.yaml", "yolov6n.yaml", P3_TO_P5),
    ("yolo11n.yaml", "yolov10n.yaml", P3_TO_P5),
    ("yolo12n.yaml", "yolo11n.yaml", P3_TO_P5),
    ("yolo26n.yaml", "yolo12n.yaml", P3_TO_P5),
    ("yolo26n.yaml", "yolov3.yaml", P3_TO_P5),
    ("yolo26n-p2.yaml", "yolov8n-p2.yaml", ["P2", *P3_TO_P5]),
    ("yolo26n-p6.yaml", "yolov5n-p6.yaml", [*P3_TO_P5, "P6"]),
    ("yolo26n-p2.yaml", "yolov8n.yaml", P3_TO_P5),
    ("yolov8n-rtdetr.yaml", "rtdetr-l.yaml", P3_TO_P5),
    ("rtdetr-l.yaml", "yolov8n-rtdetr.yaml", P3_TO_P5),
    ("rtdetr-resnet50.yaml", "yolo26n.yaml", P3_TO_P5),
    ("yolo26n.yaml", "rtdetr-resnet50.yaml", P3_TO_P5),
    ("yolov8s-world.yaml", "yolo26n.yaml", P3_TO_P5),
    ("yolov8s-worldv2.yaml", "yolov8s-world.yaml", P3_TO_P5),
    ("yolo26n.yaml", "yolov8s-worldv2.yaml", P3_TO_P5),
    ("yoloe-v8s.yaml", "yoloe-26n.yaml", P3_TO_P5),
    ("yoloe-11s.yaml", "yoloe-v8s.yaml", P3_TO_P5),
    ("yoloe-26n.yaml", "yoloe-11s.yaml", P3_TO_P5),
    ("yoloe-11s-seg.yaml", "yolo26n.yaml", P3_TO_P5),
    ("yolo11n-seg.yaml", "yoloe-11s-seg.yaml", P3_TO_P5),
    *(
        (f"{name}-{task}.yaml", f"yolo26n-{task}.yaml", P3_TO_P5)
        for name in ("yolov8n", "yolo11n", "yolo12n", "yolo26n")
        for task in ("seg", "pose", "obb")
    ),
    ("yolov9c-seg.yaml", "yolo26n-seg.yaml", P3_TO_P5),
    ("yolov8n-seg-p6.yaml", "yolo26n.yaml", P3_TO_P5),
    ("yolov8n-pose-p6.yaml", "yolo26n-p6.yaml", [*P3_TO_P5, "P6"]),
    ("yolo26n.yaml", "yolo26n-obb.yaml", P3_TO_P5),
]


@pytest.mark.slow
@pytest.mark.parametrize(("student", "teacher", "levels"), SWEEP, ids=[f"{s[:-5]}<-{t[:-5]}" for s, t, _ in SWEEP])
def test_every_family(distil, teacher_of, student, teacher, levels):
    size = 128 if "p6" in student + teacher else 64
    distil(student, teacher_of(teacher, size), levels, size, final_eval=True)


@pytest.mark.slow
def test_yoloe_learns_a_fixed_vocabulary(distil, teacher_file, teacher_of):
    """As one fine-tunes weights of YOLOE: the class names' vectors folded into the head; validated on the way."""
    from ultralytics.models.yolo.yoloe import YOLOEPETrainer

    weights = teacher_of("yoloe-v8s.yaml")
    distil(weights, teacher_file, P3_TO_P5, trainer=YOLOEPETrainer, val=True, final_eval=True, pretrained=str(weights))


@pytest.mark.parametrize(
    ("name", "found"), [("yolov8s-world.yaml", False), ("yoloe-11s.yaml", False), ("yolov10n.yaml", True)]
)
def test_class_scores_are_found_where_a_head_has_them(tmp_path, name, found):
    """An open vocabulary's head has vectors where others have scores."""
    model = load_yolo(str(tiny(tmp_path, name, "n" if "n." in name else "s"))).model
    assert score_taps(model) == ([f"model.23.cv3.{level}" for level in range(3)] if found else None)


# what looks at a training before it begins


@pytest.mark.parametrize("student", ["obb", pytest.param("rtdetr", marks=pytest.mark.slow)])
def test_the_doctor(student, teacher_file, tmp_path, task_data, rtdetr, monkeypatch):
    quality = Finding("green", "teacher's mAP", "not measured")
    monkeypatch.setattr(ultralytics_doctor, "check_quality", lambda *_, **__: quality)
    model = load_yolo(str(rtdetr if student == "rtdetr" else tiny(tmp_path, "yolo26n-obb.yaml")))
    data = task_data(model.task)
    settings = {"imgsz": 64, "batch": 4, "workers": 0, "device": "cpu"}
    report = ultralytics_doctor.diagnose_training(
        model, teacher=teacher_file, data=str(data), config=load_config(), settings=settings
    )
    assert {finding.name: finding.status for finding in report.troubles} == {}
    assert len(report.findings) > 10
