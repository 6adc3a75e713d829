import copy
import logging

import pytest
import torch

pytest.importorskip("ultralytics")

from fgd_hooks import FGDCallback, fit_channels
from fgd_hooks.errors import ConfigError
from fgd_hooks.initialization import initialize
from fgd_hooks.initialization.inherit import inherit
from fgd_hooks.initialization.weight_selection import inherit_channels
from fgd_hooks.integrations.ultralytics import initialization as hosted
from fgd_hooks.integrations.ultralytics.initialization import inherit_into, some_images, yolo_parts
from fgd_hooks.integrations.ultralytics.teacher import load_teacher
from fgd_hooks.study.worker import BatchChecksum
from tests.conftest import TINY, WIDE, architecture
from tests.helpers.tiny import TinyDetector


@pytest.fixture
def log(caplog):
    """What the training says, on Ultralytics' own logger."""
    from ultralytics.utils import LOGGER

    LOGGER.addHandler(caplog.handler)
    caplog.set_level(logging.INFO)
    yield caplog
    LOGGER.removeHandler(caplog.handler)


def lines(log):
    return [record.getMessage() for record in log.records if "inherit=" in record.getMessage()]


@pytest.fixture
def like_teacher(tmp_path):
    """A student as wide as the teacher, with weights of another seed."""
    return architecture(tmp_path, "yolo26n.yaml", WIDE)


@pytest.fixture
def teachers(teacher_file):
    return load_teacher(teacher_file).state_dict()


def in_parts(model, *parts):
    prefixes = tuple(f"{name}." for part in parts for name in yolo_parts(model)[part])
    return [name for name in model.state_dict() if name.startswith(prefixes)]


def detection_model(file, seed=0):
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(seed)
    return DetectionModel(str(file), nc=6, verbose=False)


class Stop(Exception):
    pass


@pytest.mark.slow
def test_model_and_average_begin_with_the_teachers_weights_and_a_resumed_run_does_not(
    train, teacher_file, teachers, like_teacher, tmp_path, log
):
    from ultralytics import YOLO

    seen = {}

    def look(trainer):
        for key, model in (("model", trainer.model), ("ema", trainer.ema.ema)):
            state = model.state_dict()
            seen[key] = {name for name in state if torch.equal(state[name], teachers[name])}
        seen["parts"] = set(in_parts(trainer.model, "neck", "head"))
        seen["optimized"] = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        seen["trained"] = {id(p) for p in trainer.model.parameters() if p.requires_grad}

    def stop(trainer):
        if trainer.epoch == 1:
            raise Stop

    hooks = [("on_train_start", look), ("on_train_epoch_start", stop)]
    with pytest.raises(Stop):
        callback = FGDCallback(teacher_file, inherit="neck+head")
        train(callback, model=YOLO(str(like_teacher)), epochs=2, hooks=hooks)
    assert seen["parts"] <= seen["model"]
    assert seen["parts"] <= seen["ema"]
    assert "model.0.conv.weight" not in seen["model"] | seen["ema"], "the backbone is the student's own"
    assert seen["trained"] <= seen["optimized"], "the optimizer holds the very parameters that were set"
    (line,) = lines(log)
    assert f"({len(seen['parts'])} tensors, 0 kept)" in line
    log.clear()

    last = tmp_path / "run" / "weights" / "last.pt"
    first_layer = "model.13.cv1.conv.weight"
    assert first_layer in seen["parts"]
    callback = FGDCallback(teacher_file, inherit="neck+head")
    yolo = train(callback, model=YOLO(str(last)), resume=True, hooks=[("on_train_start", look)])
    assert lines(log) == []
    assert first_layer not in seen["model"], "one epoch has moved it, and nothing put the teacher's back"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in yolo.trainer.model.modules())
    stock = detection_model(like_teacher).state_dict()
    assert YOLO(str(last)).model.state_dict().keys() == stock.keys()


def test_a_student_of_another_width_is_told_and_trains(train, teacher_file, log):
    yolo = train(FGDCallback(teacher_file, inherit="neck"))
    (record,) = [record for record in log.records if "inherit=" in record.getMessage()]
    assert record.levelno == logging.WARNING
    assert "nothing of the neck was initialised from the teacher" in record.getMessage()
    assert yolo.trainer.epoch == 0
    assert yolo.trainer.last.is_file()


def test_an_untrained_student_begins_as_a_thinned_teacher_and_a_trained_one_does_not(
    train, teacher_file, teachers, student_yaml, tmp_path, log
):
    from ultralytics import YOLO

    seen = {}

    def look(trainer):
        seen.update(model=copy.deepcopy(trainer.model.state_dict()), ema=copy.deepcopy(trainer.ema.ema.state_dict()))
        seen["images"] = some_images(trainer)

    train(FGDCallback(teacher_file), hooks=[("on_train_start", look)])
    expected, layer = detection_model(student_yaml), "model.1.conv.weight"
    inherit_channels(expected, teacher=load_teacher(teacher_file))
    assert torch.equal(expected.state_dict()[layer], teachers[layer][::2])
    fit_channels(expected, teacher=load_teacher(teacher_file), images=seen["images"])
    for name, value in expected.state_dict().items():
        assert torch.equal(seen["model"][name], value), name
        assert torch.equal(seen["ema"][name], value), name
    (line,) = lines(log)
    assert "inherit=auto" in line
    assert "0 kept" in line
    log.clear()

    last = tmp_path / "run" / "weights" / "last.pt"
    trained = YOLO(str(last)).model.state_dict()
    for settings in ({"model": YOLO(str(last)), "pretrained": True}, {"pretrained": str(last)}):
        train(FGDCallback(teacher_file), name="again", hooks=[("on_train_start", look)], **settings)
        assert lines(log) == []
        assert torch.equal(seen["model"][layer], trained[layer]), "its own weights"


def test_only_the_start_without_any_distillation(train, teacher_file, teachers, log):
    callback = FGDCallback(teacher_file, weight=0, inherit="channels")
    seen = {}

    def look(trainer):
        seen["weight"] = trainer.model.state_dict()["model.1.conv.weight"].clone()
        seen["distiller"] = callback.distiller(trainer)

    yolo = train(callback, hooks=[("on_train_start", look)])
    assert torch.equal(seen["weight"], teachers["model.1.conv.weight"][::2])
    assert seen["distiller"] is None
    assert "inherit=channels" in lines(log)[0]
    assert not (yolo.trainer.wdir / "last.fgd.safetensors").exists()
    log.clear()
    train(FGDCallback(teacher_file, weight=0), hooks=[("on_train_start", look)])
    assert lines(log) == []
    assert not torch.equal(seen["weight"], teachers["model.1.conv.weight"][::2]), "weight=0 is the stock run"


@pytest.mark.parametrize(
    "augmented",
    [pytest.param({"mosaic": 1.0, "cache": "ram"}, marks=pytest.mark.slow), {"rect": True}],
    ids=["mosaic", "rect"],
)
def test_a_student_that_is_fitted_to_its_teacher_and_then_trains_on_the_same_batches(
    train, teacher_file, student_yaml, log, augmented
):
    seen, checksums = {}, [BatchChecksum(), BatchChecksum()]

    def look(trainer):
        seen.update(model=copy.deepcopy(trainer.model.state_dict()), ema=copy.deepcopy(trainer.ema.ema.state_dict()))
        seen["images"] = [some_images(trainer), some_images(trainer)]
        seen["cache"] = trainer.args.cache

    hooks = [("on_pretrain_routine_end", checksums[0].attach), ("on_train_start", look)]
    train(FGDCallback(teacher_file, inherit="fitted"), hooks=hooks, **augmented)
    one, again = seen["images"]
    assert torch.equal(one, again)
    assert one.shape == (64, 3, 64, 64)
    assert 0 <= one.min() < one.max() <= 1
    assert len({image.sum().item() for image in one}) > 32, "more images than the set has: augmented ones"
    assert seen["cache"] == augmented.get("cache", False), "the training's own settings are as they were"
    expected, teacher = detection_model(student_yaml), load_teacher(teacher_file)
    inherit_channels(expected, teacher=teacher)
    copied = expected.state_dict()["model.1.conv.weight"].clone()
    fit_channels(expected, teacher=teacher, images=one)
    assert not torch.equal(expected.state_dict()["model.1.conv.weight"], copied)
    for name, value in expected.state_dict().items():
        assert torch.equal(seen["model"][name], value), name
        assert torch.equal(seen["ema"][name], value), name
    (line,) = lines(log)
    assert "inherit=fitted" in line
    assert "convolutions were fitted" in line

    train(name="stock", hooks=[("on_pretrain_routine_end", checksums[1].attach)], **augmented)
    assert checksums[0].value == checksums[1].value != 0


def test_the_images_are_what_the_trainer_makes_of_them_and_no_generator_of_a_gpu_is_touched(
    train, teacher_file, monkeypatch
):
    seen = {}

    def look(trainer):
        def refuse(*args):
            raise AssertionError("the training's GPU generators were seeded with the rank")

        monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
        plain = some_images(trainer)
        kind, own = type(trainer), type(trainer).preprocess_batch
        monkeypatch.setattr(kind, "preprocess_batch", lambda self, batch: {"img": own(self, batch)["img"] * 2})
        assert torch.equal(some_images(trainer), plain * 2)
        monkeypatch.setattr(kind, "preprocess_batch", lambda self, batch: batch["texts"])
        assert torch.equal(some_images(trainer), plain), "its batches hold what these do not"
        monkeypatch.undo()
        monkeypatch.setattr(initialize, "MOST_PIXELS", 2**12)
        for trainer.batch_size, trainer.world_size, images in ((8, 0, 8), (8, 1, 8), (8, 4, 2)):
            assert len(some_images(trainer)) == images, "a batch of one process"
        trainer.args.multi_scale = 0.5
        assert some_images(trainer).shape[2:] == plain.shape[2:]
        seen["looked"] = True
        raise Stop

    with pytest.raises(Stop):
        train(FGDCallback(teacher_file), hooks=[("on_train_start", look)])
    assert seen["looked"]


def test_where_nothing_could_be_fitted_the_log_warns(train, teacher_file, monkeypatch, log):
    def fail(trainer):
        raise RuntimeError("no such image")

    monkeypatch.setattr(hosted, "some_images", fail)
    train(FGDCallback(teacher_file))
    (record,) = [record for record in log.records if "inherit=" in record.getMessage()]
    assert record.levelno == logging.WARNING
    assert "no convolution was fitted; There were no images" in record.getMessage()
    assert "no such image" in record.getMessage()


def test_a_student_that_reads_texts_is_fitted_with_those_of_its_teacher():
    student, teacher = TinyDetector(), TinyDetector()
    student.txt_feats, teacher.txt_feats = own, given = torch.zeros(1, 2, 4), torch.ones(1, 3, 4)
    with pytest.raises(Stop), hosted._lent_texts(student, teacher):
        assert student.txt_feats is given
        raise Stop
    assert student.txt_feats is own
    with hosted._lent_texts(TinyDetector(), teacher) as nothing:
        assert nothing is None


def test_auto_leaves_a_student_alone_that_is_built_otherwise(tmp_path):
    student = detection_model(architecture(tmp_path, "yolov8n.yaml", TINY))
    teacher = detection_model(architecture(tmp_path, "yolo11n.yaml", WIDE), seed=1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    line, expected = inherit_into(Trainer(student), teacher, "auto")
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert expected, "nobody asked for it by name"
    assert "parameters fit" in line


class Trainer:
    """What inherit_into looks at."""

    ema = None

    def __init__(self, model):
        self.model = model


def test_parts_by_the_architecture_file(like_teacher):
    parts = yolo_parts(detection_model(like_teacher))
    assert parts == {"neck": [f"model.{number}" for number in range(11, 23)], "head": ["model.23"]}
    assert yolo_parts(TinyDetector()) == {"neck": ["neck"], "head": ["head"]}


def test_families_with_other_numbers_of_layers_pair_in_order(tmp_path):
    student = detection_model(architecture(tmp_path, "yolov8n.yaml", WIDE))
    teacher = detection_model(architecture(tmp_path, "yolo11n.yaml", WIDE), seed=1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(1)
    line, expected = inherit_into(Trainer(student), teacher, "neck+head")
    assert expected
    # the convolutions between the levels and the branches for boxes are the same in both families
    for mine, theirs in (("model.16.conv.weight", "model.17.conv.weight"), ("model.22.cv2.0.0.conv.weight",) * 2):
        theirs = theirs.replace("model.22.", "model.23.")
        assert torch.equal(student.state_dict()[mine], teacher.state_dict()[theirs]), mine
    assert "were initialised from the teacher" in line


def test_a_shallower_student_takes_what_fits(tmp_path):
    (tmp_path / "deep").mkdir()
    student = detection_model(architecture(tmp_path, "yolov8n.yaml", WIDE))
    teacher = detection_model(architecture(tmp_path / "deep", "yolov8n.yaml", {"n": [0.67, *WIDE["n"][1:]]}), seed=1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    line, _ = inherit_into(Trainer(student), teacher, "neck")
    after, given = student.state_dict(), teacher.state_dict()
    for same in ("model.15.cv1.conv.weight", "model.15.m.0.cv1.conv.weight", "model.16.conv.weight"):
        assert torch.equal(after[same], given[same]), same
    # two bottlenecks instead of one: the convolution that joins them is wider
    for other in ("model.15.cv2.conv.weight", "model.15.cv2.bn.weight", "model.22.cv2.0.0.conv.weight"):
        assert torch.equal(after[other], before[other]), other
    assert "model.12.cv2.conv.weight is" in line


def test_levels_of_other_strides_inherit_nothing(tmp_path):
    student = detection_model(architecture(tmp_path, "yolo26n.yaml", TINY))
    teacher = detection_model(architecture(tmp_path, "yolo26-p2.yaml", TINY), seed=1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    for what, expected in (("neck+head", False), ("channels", False), ("auto", True)):
        line, as_expected = inherit_into(Trainer(student), teacher, what)
        assert as_expected is expected, what
        assert "[8, 16, 32], the teacher's [4, 8, 16, 32]" in line
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_teacher_that_is_fused_gives_nothing(like_teacher):
    student, teacher = detection_model(like_teacher), detection_model(like_teacher, seed=1)
    neck = {"neck": yolo_parts(student)["neck"]}
    assert inherit(student, teacher=teacher, parts=neck).kept == {}
    result = inherit(student, teacher=teacher.fuse(verbose=False), parts=neck)
    assert not result.copied
    assert "is it fused?" in result.summary


def test_an_unknown_part():
    with pytest.raises(ConfigError, match=r"inherit is 'neck,head'.*neck\+head"):
        FGDCallback("t.pt", inherit="neck,head")
