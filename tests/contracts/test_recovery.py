"""What Ultralytics does when a run goes wrong, with the callback on: NaN recovery, out of memory, a scaler's skip."""

import gc
import logging
import weakref

import pytest
import torch

pytest.importorskip("ultralytics")

from fgd_hooks import FGDCallback
from fgd_hooks.utils.checkpoint import LAST_CHECKPOINT, read_checkpoint
from fgd_hooks.utils.modules import unwrap
from tests.integrations.ultralytics.test_callback import assert_nothing_left, hooks, rows, weights

# the start is copied only: fitted to it, a student repeats the tests' tiny teacher to more digits than results.csv has
ALWAYS = {"schedule": {"stop": None}, "inherit": "channels"}


@pytest.fixture
def said(caplog):
    """What Ultralytics' own logger, which the callback uses, printed."""
    from ultralytics.utils import LOGGER

    LOGGER.addHandler(caplog.handler)
    yield caplog
    LOGGER.removeHandler(caplog.handler)


def once(condition, action):
    """A callback that acts the first time that ``condition(trainer)`` holds."""
    done = []

    def callback(trainer):
        if not done and condition(trainer):
            done.append(1)
            action(trainer)

    return callback


@pytest.mark.slow
def test_nan_recovery_goes_back_to_the_side_file(train, teacher_file, tmp_path, said):
    """The student's weights become NaN in epoch 1; Ultralytics goes back to last.pt and repeats the epoch."""
    callback = FGDCallback(teacher_file, balance={"interval": 2}, **ALWAYS)
    begun, side = [], tmp_path / "run" / "weights" / LAST_CHECKPOINT

    def poison(trainer):
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(float("nan"))

    def begin(trainer):
        if trainer.epoch == 1:
            state = callback.distiller(trainer).training_state()
            begun.append((state, read_checkpoint(side), hooks(trainer.model), hooks(trainer.ema.ema)))

    yolo = train(
        callback,
        epochs=3,
        hooks=[
            ("on_train_epoch_start", begin),
            ("on_train_batch_start", once(lambda t: t.epoch == 1, poison)),
        ],
    )
    assert "recovering from last.pt" in said.text
    assert len(begun) == 2, "epoch 1 began twice"
    for state, saved, on_model, on_ema in begun:
        assert saved["epoch"] == 0
        for key, tensor in saved["distiller"]["modules"].items():
            assert torch.equal(tensor, state["modules"][key]), key
        assert torch.equal(saved["distiller"]["balance"]["scales"], state["balance"]["scales"])
        assert saved["distiller"]["step"] == state["step"]
        assert (on_model, on_ema) == (begun[0][2], 0)
    assert all(tensor.isfinite().all() for tensor in weights(yolo).values() if tensor.is_floating_point())
    assert [float(row["train/fgd_fg"]) > 0 for row in rows(yolo)] == [True] * 3
    assert read_checkpoint(side)["epoch"] == 2
    assert_nothing_left(yolo)


@pytest.mark.slow
def test_nan_teacher_features_on_one_batch(train, teacher_file, said):
    """The step goes on with the task's loss alone; nothing that is logged or trained becomes NaN."""
    callback = FGDCallback(teacher_file, **ALWAYS)

    def poison(trainer):
        teacher = callback.distiller(trainer)._teachers[0]
        original = teacher.features

        def broken(images):
            teacher.features = original
            return [torch.full_like(feature, float("nan")) for feature in original(images)]

        teacher.features = broken

    seen = {}

    def look(trainer):
        seen["skipped"] = callback.distiller(trainer).skipped_steps

    yolo = train(
        callback,
        epochs=2,
        hooks=[
            ("on_train_batch_start", once(lambda t: t.epoch == 1, poison)),
            ("on_train_batch_end", look),
        ],
    )
    assert seen["skipped"] == 1
    assert all(float(value) == float(value) for row in rows(yolo) for value in row.values())
    assert all(tensor.isfinite().all() for tensor in weights(yolo).values() if tensor.is_floating_point())


@pytest.mark.parametrize(
    "mode", ["gradient", pytest.param("fixed", marks=pytest.mark.slow)]
)  # a step that measures, and one that distils
def test_out_of_memory_halves_the_batch_and_goes_on(train, teacher_file, said, mode):
    """Between two accumulated backward passes, with our gradients pending and our features captured."""
    callback = FGDCallback(teacher_file, balance={"mode": mode}, **ALWAYS)
    seen = {"pending": [], "at_start": []}
    features = []

    def run_out(trainer):
        scale = trainer.scaler.scale

        def fail(loss):
            trainer.scaler.scale = scale
            seen["pending"].append(any(p.grad is not None for p in callback.distiller(trainer).parameters()))
            raise RuntimeError("CUDA out of memory (on purpose)")

        trainer.scaler.scale = fail

        def note(module, args, output):
            features.append(weakref.ref(output))
            handle.remove()

        handle = unwrap(trainer.model).model[16].register_forward_hook(note)

    def begin(trainer):
        gc.collect()
        assert all(feature() is None for feature in features), "the failed step's graph is still held"
        distiller = callback.distiller(trainer)
        seen["at_start"].append(
            all(p.grad is None or not p.grad.any() for p in distiller.parameters()) and not distiller.taps._features
        )

    steps = []
    yolo = train(
        callback,
        batch=8,
        nbs=16,
        hooks=[
            ("on_train_epoch_start", begin),
            ("on_train_batch_start", lambda trainer: steps.append(1)),
            ("on_train_batch_start", once(lambda t: len(steps) == 2, run_out)),
        ],
    )
    assert "out of memory with batch=8. Reducing to batch=4" in said.text
    assert len(features) == 1
    assert seen == {"pending": [True], "at_start": [True, True]}
    assert len(steps) == 2 + 5, "20 images in batches of 4, after two of 8"
    assert float(rows(yolo)[0]["train/fgd_fg"]) > 0
    assert_nothing_left(yolo)


def scaler_of(scale):
    def replace(trainer):
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)

    return replace


@pytest.mark.slow
def test_a_loss_scaler_changes_nothing(train, teacher_file):
    """Its factor, a power of two, cancels exactly: in the student's step, in the adapters' and in the balance."""
    found = {}
    for name, scale in (("plain", None), ("scaled", 2.0**10)):
        callback = FGDCallback(teacher_file, balance={"interval": 2}, optimizer={"clip": 1e6}, **ALWAYS)
        states = []

        def look(trainer, callback=callback, states=states):
            states.append(callback.distiller(trainer).training_state())

        start = [("on_train_start", scaler_of(scale))] if scale else []
        yolo = train(callback, name=name, hooks=[*start, ("on_train_epoch_end", look)])
        found[name] = (weights(yolo), states[-1])
    assert all(torch.equal(tensor, found["scaled"][0][key]) for key, tensor in found["plain"][0].items())
    for key, tensor in found["plain"][1]["modules"].items():
        assert torch.equal(tensor, found["scaled"][1]["modules"][key]), key
    assert torch.equal(*(found[name][1]["balance"]["scales"] for name in found))


@pytest.mark.slow
def test_a_step_that_the_scaler_skips_leaves_the_adapters_alone(train, teacher_file):
    callback, states = FGDCallback(teacher_file, **ALWAYS), []

    def overflow(trainer):
        parameter = next(trainer.model.parameters())
        handle = parameter.register_hook(lambda gradient: (handle.remove(), gradient * float("inf"))[1])

    def look(trainer):
        modules = callback.distiller(trainer).training_state()["modules"]
        pending = any(p.grad is not None for p in callback.distiller(trainer).parameters())
        states.append((modules, weights_of(trainer), pending))

    def weights_of(trainer):
        return [parameter.detach().clone() for parameter in trainer.model.parameters()]

    steps = []
    train(
        callback,
        hooks=[
            ("on_train_start", scaler_of(2.0**10)),
            ("on_train_batch_start", lambda trainer: steps.append(1)),
            ("on_train_batch_start", once(lambda t: len(steps) == 3, overflow)),
            ("on_train_batch_end", look),
        ],
    )
    assert not any(pending for *_, pending in states), "no stale gradient waits for the next step"

    def moved(step):
        (one, student), (other, later) = states[step - 1][:2], states[step][:2]
        adapters = any(not torch.equal(tensor, other[key]) for key, tensor in one.items())
        return adapters, any(not torch.equal(a, b) for a, b in zip(student, later, strict=True))

    assert [moved(step) for step in range(1, 5)] == [(True, True), (False, False), (True, True), (True, True)]


def test_bfloat16_training(train, teacher_file, monkeypatch):
    """Ultralytics allows bfloat16 on GPUs only; torch's autocast knows it on the CPU as well."""
    import ultralytics.engine.trainer as host

    monkeypatch.setattr(host, "autocast", lambda dtype, device: torch.autocast(device, torch.bfloat16))
    callback, seen = FGDCallback(teacher_file, **ALWAYS), {}

    def look(trainer):
        distiller = callback.distiller(trainer)
        seen["dtypes"] = {parameter.dtype for parameter in distiller.parameters()}
        seen["finite"] = all(parameter.isfinite().all() for parameter in distiller.parameters())
        seen["amp"] = trainer.amp

    yolo = train(callback, amp="bf16", hooks=[("on_train_epoch_end", look)])
    assert seen == {"dtypes": {torch.float32}, "finite": True, "amp": True}
    assert all(float(rows(yolo)[0][f"train/{part}"]) > 0 for part in ("fgd_fg", "fgd_bg", "fgd_att", "fgd_glob"))


def test_a_dominating_distillation_is_said(train, teacher_file, caplog, monkeypatch):
    import fgd_hooks.guards

    monkeypatch.setattr(fgd_hooks.guards, "DOMINANT_STEPS", 5)
    with caplog.at_level(logging.WARNING, "fgd_hooks"):
        train(FGDCallback(teacher_file, weight=1e6, balance={"mode": "fixed"}, **ALWAYS), epochs=2)
    assert "Lower weight (1e+06)" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [{"batch": 19}, {"imgsz": 32}, {"imgsz": 96}, {"batch": 1, "nbs": 4}],
    ids=["last batch of 1", "coarsest map of one cell", "larger than the teacher's", "batches of 1"],
)
def test_edges_of_the_data(train, teacher_file, settings):
    yolo = train(FGDCallback(teacher_file, **ALWAYS), **settings)
    assert float(rows(yolo)[0]["train/fgd_fg"]) > 0
    assert all(float(value) == float(value) for value in rows(yolo)[0].values())
    assert_nothing_left(yolo)


def test_images_without_any_object(train, teacher_file, data, tmp_path):
    """Every third image of the set has no label file: batches of 1 without any box among them."""
    import shutil

    import yaml

    copied = tmp_path / "unlabelled"
    shutil.copytree(data.parent, copied, ignore=shutil.ignore_patterns("*.cache"))
    content = yaml.safe_load((copied / data.name).read_text())
    content["path"] = str(copied)
    (copied / data.name).write_text(yaml.safe_dump(content))
    labels = sorted((copied / "labels" / "train").glob("*.txt"))
    for label in labels[::3]:
        label.unlink()
    yolo = train(FGDCallback(teacher_file, **ALWAYS), batch=1, nbs=4, data=str(copied / data.name))
    assert float(rows(yolo)[0]["train/fgd_fg"]) > 0
    assert all(float(value) == float(value) for value in rows(yolo)[0].values())
