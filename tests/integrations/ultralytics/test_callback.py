import csv
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("ultralytics")

from fgd_hooks import FGDCallback
from fgd_hooks.config import load_config
from fgd_hooks.errors import ConfigError, TeacherError
from fgd_hooks.integrations.ultralytics.boxes import boxes_of
from fgd_hooks.integrations.ultralytics.callback import EVENTS
from fgd_hooks.integrations.ultralytics.session import TrainingSession
from fgd_hooks.utils.checkpoint import LAST_CHECKPOINT, read_checkpoint, write_checkpoint

PARTS = ["fgd_fg", "fgd_bg", "fgd_att", "fgd_glob"]


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def rows(yolo):
    with open(yolo.trainer.csv) as file:
        return list(csv.DictReader(file))


def weights(yolo):
    return {k: v.clone() for k, v in yolo.trainer.model.state_dict().items()}


def assert_nothing_left(yolo):
    assert hooks(yolo.trainer.model) == 0
    assert hooks(yolo.trainer.ema.ema) == 0
    assert len(yolo.trainer.optimizer._optimizer_step_post_hooks) == 0


def test_two_lines_distil(train, teacher_file):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = {}

    def look(trainer):
        distiller = callback.distiller(trainer)
        seen["adapter"] = distiller.adapters["P3"].weight.detach().clone()
        seen["levels"] = distiller.level_names
        seen["hooks"] = hooks(trainer.model)
        seen["ema"] = hooks(trainer.ema.ema)

    callback = FGDCallback(teacher=teacher_file, log_interval=1)
    yolo = train(callback, epochs=2, val=True, close_mosaic=0, hooks=[("on_train_batch_end", look)])
    assert seen["levels"] == ["P3", "P4", "P5"]
    assert seen["hooks"] == 6, "before and after the model, before its head, and a meter on each of its three levels"
    assert seen["ema"] == 0
    assert_nothing_left(yolo)
    first, second = rows(yolo)
    for part in PARTS:
        assert float(first[f"train/{part}"]) > 0
        assert float(second[f"train/{part}"]) == 0, "by default the last part of a training is the task's alone"
    assert float(first["train/fgd"]) == pytest.approx(sum(float(first[f"train/{part}"]) for part in PARTS), rel=1e-3)
    assert float(first["val/fgd"]) == 0
    events = EventAccumulator(str(yolo.trainer.save_dir))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    expected = {f"fgd/levels/P4/{p}" for p in ("foreground", "background", "attention", "global")}
    expected |= {"fgd/parts/foreground", "fgd/raw/P5/global", "fgd/balance/scale/P3", "fgd/balance/ratio/P3"}
    expected |= {"fgd/adapter_gradient_norm", "fgd/task_loss", "train/box_loss", "metrics/mAP50-95(B)", "lr/pg0"}
    assert expected <= tags
    assert [e.step for e in events.Scalars("fgd/parts/foreground")] == list(range(10))
    assert all(e.value > 0 for e in events.Scalars("fgd/adapter_gradient_norm")[:5])
    assert [e.value for e in events.Scalars("fgd/weight")] == [1.0] * 5 + [0.0] * 5


def test_weight_zero_is_the_stock_run_bit_for_bit(train, teacher_file):
    """20 optimizer steps; and with a weight the run does differ, so that the comparison can fail."""
    found = {}
    for name, callback in (
        ("stock", None),
        ("zero", FGDCallback(teacher_file, weight=0)),
        ("distilled", FGDCallback(teacher_file)),
    ):
        steps = []
        yolo = train(callback, name=name, epochs=4, hooks=[("on_train_batch_end", lambda t, s=steps: s.append(1))])
        assert len(steps) == 20
        found[name] = weights(yolo)
        found[f"{name} columns"] = list(rows(yolo)[0])
    assert all(torch.equal(v, found["zero"][k]) for k, v in found["stock"].items())
    assert found["zero columns"] == found["stock columns"]
    moved = [k for k, v in found["stock"].items() if not torch.equal(v, found["distilled"][k])]
    assert any(k.endswith("conv.weight") for k in moved)


def test_checkpoints_stay_stock(train, teacher_file, tmp_path):
    """From the first epoch on, before Ultralytics strips the optimizer, and without fgd_hooks on the machine."""
    sizes, copies = {}, {}

    def keep(trainer):
        content = trainer.last.read_bytes()
        sizes.setdefault(trainer.args.name, len(content))
        copies.setdefault(trainer.args.name, tmp_path / f"{trainer.args.name}.pt").write_bytes(content)

    for name, callback in (("stock", None), ("distilled", FGDCallback(teacher_file))):
        train(callback, name=name, hooks=[("on_model_save", keep)])
    assert abs(sizes["stock"] - sizes["distilled"]) < 1024
    code = (
        "import sys; sys.modules['fgd_hooks'] = None\n"
        "import torch\nfrom ultralytics import YOLO\n"
        "y = YOLO('distilled.pt')\n"
        "assert not any(m._forward_hooks or m._forward_pre_hooks for m in y.model.modules())\n"
        "y.predict(torch.zeros(1, 3, 64, 64), verbose=False)\n"
        "print(sum(p.numel() for p in y.model.parameters()), [k for k in y.ckpt if 'fgd' in k])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    from ultralytics import YOLO

    count = sum(p.numel() for p in YOLO(str(copies["stock"])).model.parameters())
    assert f"{count} []" in done.stdout


class Stop(Exception):
    pass


def interrupt_after(epoch):
    def stop(trainer):
        if trainer.epoch == epoch:
            raise Stop

    return "on_train_epoch_start", stop


def interrupted(train, teacher_file, name, **settings):
    callback = FGDCallback(teacher_file, **settings)
    with pytest.raises(Stop):
        train(callback, name=name, epochs=4, hooks=[interrupt_after(2)])


def test_resume_goes_on_from_the_side_file(train, teacher_file, tmp_path):
    from ultralytics import YOLO

    interrupted(train, teacher_file, "run")
    last = tmp_path / "run" / "weights" / "last.pt"
    saved = read_checkpoint(last.parent / LAST_CHECKPOINT)
    assert saved["epoch"] == 1
    callback, seen = FGDCallback(teacher_file), {}

    def look(trainer):
        distiller = callback.distiller(trainer)
        seen.update(state=distiller.training_state(), start=trainer.start_epoch)

    yolo = train(callback, model=YOLO(str(last)), name="run", resume=True, hooks=[("on_train_start", look)])
    assert seen["start"] == 2
    state = saved["distiller"]
    assert all(torch.equal(v, state["modules"][k]) for k, v in seen["state"]["modules"].items())
    assert torch.equal(seen["state"]["balance"]["scales"], state["balance"]["scales"])
    assert seen["state"]["step"] == state["step"] == 10
    assert read_checkpoint(last.parent / LAST_CHECKPOINT)["distiller"]["step"] == 20
    assert_nothing_left(yolo)


@pytest.mark.slow
def test_resume_with_other_settings_says_so_and_keeps_those_of_the_beginning(train, teacher_file, tmp_path, caplog):
    from ultralytics import YOLO
    from ultralytics.utils import LOGGER

    interrupted(train, teacher_file, "run", balance={"ratio": 2.0})
    folder = tmp_path / "run"
    LOGGER.addHandler(caplog.handler)
    try:
        train(FGDCallback(teacher_file), model=YOLO(str(folder / "weights/last.pt")), name="run", resume=True)
        assert "fgd.balance.ratio=2.0 (now 1.0)" in caplog.text
        assert caplog.text.count("(now") == 1
        assert load_config(folder / "fgd-begun.yaml").balance.ratio == 2.0
        assert load_config(folder / "fgd.yaml").balance.ratio == 1.0
        caplog.clear()
        interrupted(train, teacher_file, "other", balance={"ratio": 2.0})
        other = YOLO(str(tmp_path / "other/weights/last.pt"))
        train(FGDCallback(teacher_file, config=tmp_path / "other/fgd.yaml"), model=other, name="other", resume=True)
        assert "(now" not in caplog.text
    finally:
        LOGGER.removeHandler(caplog.handler)


@pytest.mark.slow
def test_resume_refuses_a_side_file_of_another_architecture(train, teacher_file, tmp_path):
    from ultralytics import YOLO

    interrupted(train, teacher_file, "run")
    folder = tmp_path / "run" / "weights"
    content = read_checkpoint(folder / LAST_CHECKPOINT)
    content["distiller"]["levels"][0] = "P3: stride 8, 99 channels / stride 8, 99 channels"
    write_checkpoint(folder / LAST_CHECKPOINT, content)
    yolo = YOLO(str(folder / "last.pt"))
    with pytest.raises(ValueError, match="another distillation.*99 channels"):
        train(FGDCallback(teacher_file), model=yolo, name="run", resume=True)
    assert_nothing_left(yolo)


@pytest.mark.slow
def test_resume_without_a_side_file_says_so(train, teacher_file, tmp_path, caplog):
    from ultralytics import YOLO

    interrupted(train, teacher_file, "run")
    folder = tmp_path / "run" / "weights"
    (folder / LAST_CHECKPOINT).unlink()
    from ultralytics.utils import LOGGER

    LOGGER.addHandler(caplog.handler)
    try:
        train(FGDCallback(teacher_file), model=YOLO(str(folder / "last.pt")), name="run", resume=True)
    finally:
        LOGGER.removeHandler(caplog.handler)
    assert "start anew" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"multi_scale": 0.5}, marks=pytest.mark.slow),
        pytest.param({"freeze": 5}, marks=pytest.mark.slow),
        pytest.param({"nbs": 12}, marks=pytest.mark.slow),
        {"rect": True},
        pytest.param({"mosaic": 1.0, "close_mosaic": 1, "epochs": 2}, marks=pytest.mark.slow),
        {"optimizer": "MuSGD"},
        pytest.param({"single_cls": True}, marks=pytest.mark.slow),
    ],
    ids=lambda s: next(iter(s)),
)
def test_works_with(train, teacher_file, settings):
    yolo = train(FGDCallback(teacher_file), **settings)
    assert float(rows(yolo)[0]["train/fgd_fg"]) > 0
    assert_nothing_left(yolo)


@pytest.mark.slow
def test_accumulated_gradients_step_the_adapters_with_the_student(train, teacher_file):
    seen = []

    def look(trainer):
        run = callback._sessions[trainer]
        parameter = run.distiller.adapters["P3"].weight
        moments = run.optimizer.state.get(parameter, {})
        seen.append((int(moments.get("step", 0)), parameter.grad is not None))

    callback = FGDCallback(teacher_file)
    train(callback, nbs=12, hooks=[("on_train_batch_end", look)])
    # five batches, a step of the optimizer after the first and every third
    assert [step for step, _ in seen] == [0, 0, 1, 1, 1] or [step for step, _ in seen] == [1, 1, 1, 2, 2]
    assert {pending for _, pending in seen} == {True, False}


def test_adapters_stand_still_where_nothing_is_distilled(train, teacher_file):
    seen = []

    def look(trainer):
        run = callback._sessions[trainer]
        seen.append({name: tensor.clone() for name, tensor in run.distiller.state_dict().items()})

    callback = FGDCallback(teacher_file, schedule={"stop": 0.5})
    train(callback, epochs=2, hooks=[("on_train_batch_end", look)])
    first, second = seen[:5], seen[5:]
    assert not torch.equal(first[0]["adapters.P3.weight"], first[-1]["adapters.P3.weight"])
    moved = {name for state in second for name, tensor in state.items() if not torch.equal(tensor, first[-1][name])}
    assert not moved


@pytest.mark.slow
def test_adapters_skip_the_steps_that_a_fused_optimizer_skips(train, teacher_file):
    """A loss scaler tells such an optimizer of an overflow by its attribute found_inf, and calls step all the same."""
    seen = []

    def look(trainer):
        run = callback._sessions[trainer]
        before = [parameter.clone() for parameter in run.parameters]
        for overflow in (1.0, 0.0):
            run.taught = True
            for parameter in run.parameters:
                parameter.grad = torch.ones_like(parameter)
            fused = SimpleNamespace(param_groups=trainer.optimizer.param_groups, found_inf=torch.tensor(overflow))
            run.step(fused)
            assert all(parameter.grad is None for parameter in run.parameters)
            seen.append(all(torch.equal(old, new) for old, new in zip(before, run.parameters, strict=True)))

    callback = FGDCallback(teacher_file)
    train(callback, hooks=[("on_train_batch_end", look)])
    assert seen == [True, False] * 5


@pytest.mark.slow
def test_two_trainings_of_one_object(train, teacher_file):
    callback = FGDCallback(teacher_file)
    yolo = train(callback, name="one")
    first = rows(yolo)
    train(model=yolo, name="two")
    assert float(rows(yolo)[-1]["train/fgd_fg"]) > 0
    assert list(rows(yolo)[0]) == list(first[0])
    assert_nothing_left(yolo)
    callback.detach(yolo)
    train(model=yolo, name="three")
    assert "train/fgd_fg" not in rows(yolo)[-1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_in_the_middle_leaves_no_hook(train, teacher_file, error):
    from ultralytics import YOLO

    kept = []

    def fail(trainer):
        kept.append(trainer)
        raise error

    callback = FGDCallback(teacher_file)
    with pytest.raises(error):
        train(callback, model=YOLO(str(teacher_file)), hooks=[("on_train_batch_end", fail)])
    assert hooks(kept[0].model) == 0
    assert len(kept[0].optimizer._optimizer_step_post_hooks) == 0
    assert callback.distiller(kept[0]) is None


def test_the_students_gradient_is_the_stock_one_plus_the_distillations(teacher_file, student_yaml, tmp_path):
    """One batch through model(batch), as the trainer calls it."""
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    from fgd_hooks.config import load_config
    from fgd_hooks.integrations.ultralytics.teacher import load_teacher

    torch.manual_seed(0)
    model = DetectionModel(str(student_yaml), nc=6, verbose=False).train()
    model.args = get_cfg()
    batch = example_batch()

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]

    stock = gradients(model(batch)[0].sum())

    class Trainer:
        ema = None
        args = get_cfg()
        device = torch.device("cpu")
        amp = resume = False
        batch_size, world_size = 4, 0
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        save_dir = wdir = tmp_path

    trainer = Trainer()
    trainer.model = model
    run = TrainingSession(
        trainer,
        [load_teacher(teacher_file)],
        load_config({"balance": {"mode": "fixed"}, "log_interval": 0, "weight": 50}),
    )
    run.install()
    loss, items = model(batch)
    both = gradients(loss.sum())
    added = gradients(model(batch)[0][-1])
    run.remove()
    assert list(items)[-1] == "fgd", "one column of the progress bar"
    assert float(items["fgd"]) == pytest.approx(sum(float(items[p]) for p in PARTS))
    assert loss[-1].item() == pytest.approx(4 * sum(float(items[p]) for p in PARTS), rel=1e-5)
    largest = max(float(g.abs().max()) for g in both)
    assert max(float(g.abs().max()) for g in added) > 1e-3 * largest, "else the comparison below could not fail"
    for one, other, total in zip(stock, added, both, strict=True):
        torch.testing.assert_close(total, one + other, rtol=1e-3, atol=1e-6 * largest)


def example_batch(size=64):
    generator = torch.Generator().manual_seed(0)
    return {
        "img": torch.rand(4, 3, size, size, generator=generator),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.2], [0.25, 0.75, 0.1, 0.5], [0.5, 0.5, 1.0, 1.0]]),
        "batch_idx": torch.tensor([0.0, 0.0, 3.0]),
        "cls": torch.tensor([[0.0], [1.0], [2.0]]),
    }


def test_boxes_are_pixels_of_the_networks_input():
    batch = example_batch()
    batch["img"] = torch.zeros(4, 3, 100, 200)
    packed = boxes_of(batch)
    expected = torch.tensor([[60.0, 40, 140, 60], [40, 50, 60, 100], [0, 0, 200, 100]])
    torch.testing.assert_close(packed.boxes, expected)
    assert packed.image.tolist() == [0, 0, 3]
    assert packed.num_images == 4
    batch.update(bboxes=torch.zeros(0, 4), batch_idx=torch.zeros(0))
    assert len(boxes_of(batch)) == 0


FAMILIES = [
    ("yolov8n.yaml", "yolo26n.yaml", ["P3", "P4", "P5"]),
    ("yolo11n.yaml", "yolov8n.yaml", ["P3", "P4", "P5"]),
    ("yolo12n.yaml", "yolo11n.yaml", ["P3", "P4", "P5"]),
    ("yolo26n.yaml", "yolo12n.yaml", ["P3", "P4", "P5"]),
    ("yolo26n.yaml", "yolov8-p2.yaml", ["P3", "P4", "P5"]),
    ("yolo26-p2.yaml", "yolo26-p6.yaml", ["P3", "P4", "P5"]),
    ("yolov8-p6.yaml", "yolo26-p6.yaml", ["P3", "P4", "P5", "P6"]),
]


@pytest.mark.parametrize(
    ("student", "teacher", "levels"), FAMILIES, ids=[f"{s[:-5]}<-{t[:-5]}" for s, t, _ in FAMILIES]
)
def test_families_and_class_counts_mix(student, teacher, levels):
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    from fgd_hooks import Distiller

    torch.manual_seed(0)
    models = [DetectionModel(name, nc=nc, verbose=False).train() for name, nc in ((student, 3), (teacher, 80))]
    with torch.no_grad():
        for _ in range(2):  # batch statistics: an untrained YOLO in eval mode has features near 0
            models[1](torch.rand(2, 3, 128, 128))
    models[0].args = get_cfg()
    distiller = Distiller(models[0], teacher=models[1], config={"balance": {"mode": "fixed"}})
    assert distiller.level_names == levels
    batch = example_batch(128)
    loss, _ = models[0](batch)
    result = distiller(batch["img"], boxes_of(batch))
    (loss.sum() + result.loss).backward()
    assert all(float(parts["foreground"]) > 0 for parts in result.levels.values())
    tapped = models[0].model[models[0].model[-1].f[0]]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in tapped.parameters())


def test_travels_to_other_processes(teacher_file):
    import cloudpickle
    from ultralytics import YOLO

    callback = FGDCallback(YOLO(str(teacher_file)), weight=2)
    yolo = YOLO("yolo26n.yaml")
    callback.attach(yolo)
    packed = cloudpickle.dumps(yolo.callbacks)
    assert len(packed) < 200_000, "no teacher travels, only its path"
    received = pickle.loads(packed)
    handlers = [h for each in received.values() for h in each if getattr(h, "callback", None).__class__ is FGDCallback]
    assert len(handlers) == len(EVENTS)
    assert len({id(h.callback) for h in handlers}) == 1
    assert handlers[0].callback.config == callback.config
    assert handlers[0].callback.teacher == str(teacher_file)


# mistakes


def test_teacher_file_missing(student_yaml, tmp_path):
    from ultralytics import YOLO

    (tmp_path / "teacher.pt").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"teachr\.pt.*'teacher\.pt'"):
        FGDCallback(tmp_path / "teachr.pt").attach(YOLO(str(student_yaml)))


def test_teacher_is_no_checkpoint(student_yaml, tmp_path):
    from ultralytics import YOLO

    yolo = YOLO(str(student_yaml))
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(TeacherError, match=r"broken\.pt"):
        FGDCallback(tmp_path / "broken.pt").attach(yolo)
    with pytest.raises(TeacherError, match="no weights"):
        FGDCallback("yolo26s.yaml").attach(yolo)
    with pytest.raises(TeacherError, match="int"):
        FGDCallback(7).attach(yolo)
    assert not any(getattr(h, "callback", None).__class__ is FGDCallback for e in yolo.callbacks.values() for h in e)


def test_teacher_is_no_detector(student_yaml):
    from ultralytics import YOLO

    with pytest.raises(TeacherError, match="classify"):
        FGDCallback(YOLO("yolo26n-cls.yaml")).attach(YOLO(str(student_yaml)))


def test_teacher_is_the_student(teacher_file):
    from ultralytics import YOLO

    yolo = YOLO(str(teacher_file))
    with pytest.raises(TeacherError, match="same object"):
        FGDCallback(yolo).attach(yolo)


def test_teacher_holds_nan(teacher_file, student_yaml):
    from ultralytics import YOLO

    teacher = YOLO(str(teacher_file))
    with torch.no_grad():
        next(teacher.model.parameters()).fill_(float("nan"))
    with pytest.raises(TeacherError, match="NaN"):
        FGDCallback(teacher).attach(YOLO(str(student_yaml)))


def test_no_common_level(train):
    class Coarse(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, 64, 1), nn.Conv2d(4, 4, 3, 2, 1)

        def forward(self, x):
            x = self.a(x)
            return [x, self.b(x)]

    from fgd_hooks.errors import PairingError

    with pytest.raises(PairingError, match="stride 64"):
        train(FGDCallback(Coarse()))


def test_misspelt_setting():
    with pytest.raises(ConfigError, match=r"balance\.ratoi.*balance\.ratio"):
        FGDCallback("t.pt", balance={"ratoi": 1})
    with pytest.raises(ConfigError, match="wieght"):
        FGDCallback("t.pt", wieght=1)


def test_attached_to_something_else():
    with pytest.raises(TypeError, match=r"fgd_hooks\.Distiller"):
        FGDCallback("t.pt").attach(nn.Conv2d(1, 1, 1))


def test_any_module_can_teach(train):
    from tests.helpers.tiny import TinyDetector, trained

    yolo = train(FGDCallback(trained(TinyDetector((8, 12, 16)))))
    assert float(rows(yolo)[-1]["train/fgd_fg"]) > 0
