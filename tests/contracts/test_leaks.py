"""Long runs: nothing grows from step to step, and detach leaves nothing behind. The garbage collector is off."""

import gc
import weakref

import psutil
import pytest
import torch

from fgd_hooks import Distiller, FGDCallback
from tests.helpers.tiny import TinyDetector, batch, trained

TABLES = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
TABLES += ("_backward_hooks", "_backward_pre_hooks", "_forward_hooks_always_called", "_state_dict_hooks")


@pytest.fixture(autouse=True)
def no_garbage_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def as_found(*models):
    """Hook tables, requires_grad flags and training modes of all modules."""
    return [
        (
            [(name, module.training, [list(getattr(module, table)) for table in TABLES]) for name, module in modules],
            [(name, parameter.requires_grad, len(parameter._backward_hooks or ())) for name, parameter in parameters],
        )
        for modules, parameters in ((list(m.named_modules()), list(m.named_parameters())) for m in models)
    ]


def live_tensors():
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


@pytest.mark.slow
def test_fifty_cycles_leave_everything_as_found():
    student, teacher = trained(TinyDetector()), trained(TinyDetector((8, 16, 24)), seed=1)
    student.stages[0].eval()  # a frozen stage and a teacher in mixed modes
    student.stem[0].weight.requires_grad_(False)
    teacher.neck.eval()
    teacher.stem[0].weight.requires_grad_(False)
    images, boxes = batch()
    found = as_found(student, teacher)
    counts = []
    for cycle in range(50):
        with Distiller(student, teacher=teacher) as distiller:
            assert as_found(student) != found[:1], "the hooks are there"
            assert as_found(teacher) != found[1:]
            if cycle % 2:
                student(images)
                distiller(images, boxes).loss.backward()
        distiller.detach()  # once more does no harm
        del distiller
        student.zero_grad()
        assert as_found(student, teacher) == found
        counts.append(live_tensors())
    assert counts[-1] == counts[1]


@pytest.mark.parametrize("how", ["detached", "after an error", "never detached"])
def test_no_cycle_keeps_teacher_or_distiller_alive(how):
    student, teacher = trained(TinyDetector()), trained(TinyDetector((8, 16, 24)), seed=1)
    images, boxes = batch()
    distiller = Distiller(student, teacher=teacher)
    student(images)
    distiller(images, boxes).loss.backward()
    alive = [weakref.ref(each) for each in (teacher, distiller, distiller._teachers[0])]
    if how == "after an error":
        student(images)
        with pytest.raises(ValueError):
            distiller(images, boxes[:1])
    if how != "never detached":  # else the hooks that stay on the student keep its taps
        alive.append(weakref.ref(distiller.taps))
        distiller.detach()
    del distiller, teacher
    assert [reference() for reference in alive] == [None] * len(alive)


@pytest.mark.parametrize("steps", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_and_hooks_stay_flat(steps):
    student, teacher = trained(TinyDetector()), trained(TinyDetector((8, 16, 24)), seed=1)
    distiller = Distiller(student, teacher=teacher, config={"interval": 2, "schedule": {"stop": None}})
    optimizer = torch.optim.AdamW([*student.parameters(), *distiller.parameters()], 1e-4)
    batches = [batch(seed) for seed in range(4)]
    process = psutil.Process()
    found = []
    for step in range(steps + 100):
        images, boxes = batches[step % len(batches)]
        task = (student(images)["scores"] - 1).square().mean()
        distilled = distiller(images, boxes)
        (task + distilled.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:  # a validation
            with torch.no_grad():
                student(images)
                distiller(images, boxes)
        if step in (99, steps + 99):
            del task, distilled
            found.append((live_tensors(), as_found(student, teacher), process.memory_info().rss))
    (tensors, hooks, memory), (tensors_after, hooks_after, memory_after) = found
    assert tensors_after == tensors
    assert hooks_after == hooks
    print(f"{steps} steps: {tensors} tensors, resident memory {(memory_after - memory) / 2**20:+.1f} MiB")
    assert memory_after - memory < 16 * 2**20


def test_the_teacher_is_gone_after_an_ultralytics_training(train, teacher_file):
    pytest.importorskip("ultralytics")
    alive = []

    def look(trainer):
        session = callback._sessions[trainer]
        alive.extend(weakref.ref(each) for each in (session.distiller._teachers[0].model, session.distiller, session))

    callback = FGDCallback(teacher_file, log_interval=0)
    yolo = train(callback, hooks=[("on_train_start", look)])
    assert len(alive) == 3
    assert [reference() for reference in alive] == [None] * 3
    assert yolo.trainer is not None, "while the trainer lives on"
