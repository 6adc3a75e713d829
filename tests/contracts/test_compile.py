"""Compiled students and compiled teachers distil as eager ones do."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import pickle
import types
import weakref

import pytest
import torch
from torch import nn

from fgd_hooks import Distiller, FGDConfig
from fgd_hooks.config import TeacherConfig
from fgd_hooks.errors import TapError
from fgd_hooks.taps.levels import find_sources
from fgd_hooks.taps.tap import Tap
from fgd_hooks.teacher import COMPILES_FROM, FrozenTeacher
from fgd_hooks.utils.modules import unwrap
from tests.helpers.tiny import TinyDetector, batch, trained

old = torch.__version__ < COMPILES_FROM
new_compiler = pytest.mark.skipif(old, reason="compiling was tried with torch 2.15; torch 2.4 cannot")

TAPS = [Tap("head", "input", (number,)) for number in range(3)]


def plain_features(teacher, images):
    frozen = FrozenTeacher(teacher, TAPS, TeacherConfig())
    features = frozen.features(images)
    frozen.release()
    return features


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def backend():
    """A backend that runs what it is given as it is, through AOTAutograd, and counts the graphs."""
    from torch._dynamo.backends.debugging import aot_eager

    def compile_graph(graph, inputs, **_):
        compile_graph.graphs += 1
        return aot_eager(graph, inputs)

    compile_graph.graphs = 0
    return compile_graph


def models():
    torch.manual_seed(0)
    return trained(TinyDetector()), trained(TinyDetector((12, 16, 24)), 1)


def steps(student, called, distiller, count=4):
    """Per step: the distillation loss, all gradients of the student, and the measured ratios."""
    found = []
    for number in range(count):
        images, boxes = batch(number)
        student.zero_grad()
        task = called(images)["scores"].square().mean()
        distilled = distiller(images, boxes)
        (task + distilled.loss).backward()
        gradients = [p.grad.clone() for p in student.parameters()]
        found.append((distilled.loss.detach(), gradients, distiller.balance.ratios.clone()))
    return found


def eager_steps():
    student, teacher = models()
    torch.manual_seed(1)
    return steps(student, student, Distiller(student, teacher=teacher))


def assert_same(found, expected, **tolerance):
    for (loss, gradients, ratios), (e_loss, e_gradients, e_ratios) in zip(found, expected, strict=True):
        torch.testing.assert_close(loss, e_loss, **tolerance)
        torch.testing.assert_close(gradients, e_gradients, **tolerance)
        torch.testing.assert_close(ratios, e_ratios, equal_nan=True, **tolerance)
    assert bool(torch.isfinite(found[-1][2]).all())  # the balance did measure


@new_compiler
@pytest.mark.parametrize("order", ["compiled first", "tapped first"])
def test_a_compiled_student_distils_like_an_eager_one(order, backend):
    expected = eager_steps()
    student, teacher = models()
    torch.manual_seed(1)
    if order == "compiled first":
        called = torch.compile(student, backend=backend)
        distiller = Distiller(called, teacher=teacher)
    else:
        distiller = Distiller(student, teacher=teacher)
        called = torch.compile(student, backend=backend)
    assert_same(steps(student, called, distiller), expected)
    assert backend.graphs == 1  # the taps do not cut the graph


def test_compiling_goes_on_around_the_taps(backend):
    student, teacher = models()
    distiller = Distiller(student, teacher=teacher)
    called = torch.compile(student, backend=backend)
    steps(student, called, distiller, 1)
    first = backend.graphs
    steps(student, called, distiller, 3)
    assert backend.graphs == first  # nothing is compiled anew from step to step, measuring or not


class BreaksBeforeHead(TinyDetector):
    """Compiled in two graphs: the tapped features are outputs of the first and inputs of the second."""

    def forward(self, images):
        features = [self.stem(images)]
        for stage in self.stages:
            features.append(stage(features[-1]))
        found = self.neck(features)
        torch._dynamo.graph_break()
        return self.head(found)


@new_compiler
def test_a_graph_that_ends_before_the_head_measures_the_whole_gradient(backend):
    """The levels of a neck feed each other inside the first graph, where no hook on a feature sees it."""
    torch.manual_seed(0)
    student, teacher = trained(BreaksBeforeHead()), models()[1]
    twin = copy.deepcopy(student)
    torch.manual_seed(1)
    expected = steps(twin, twin, Distiller(twin, teacher=teacher))
    torch.manual_seed(1)
    distiller = Distiller(student, teacher=teacher)
    assert_same(steps(student, torch.compile(student, backend=backend), distiller), expected)
    assert backend.graphs == 2


@new_compiler
def test_what_a_meter_found_has_memory_of_its_own(backend):
    """Under CUDA graphs the gradient's memory is that of the next step's tensors."""
    student, teacher = models()
    distiller = Distiller(student, teacher=teacher)
    steps(student, torch.compile(student, backend=backend), distiller, 1)
    for meter in distiller.taps.meters:
        assert meter.scalar.grad is None
        assert float(meter.norm) > 0


@pytest.mark.slow
def test_a_student_compiled_by_inductor_distils_like_an_eager_one():
    expected = eager_steps()
    student, teacher = models()
    torch.manual_seed(1)
    called = torch.compile(student)
    assert_same(steps(student, called, Distiller(called, teacher=teacher)), expected, rtol=2e-3, atol=1e-5)


def test_taps_set_after_the_first_compiled_call_are_no_silent_zero(backend):
    student, teacher = models()
    called = torch.compile(student, backend=backend)
    called(batch()[0])
    distiller = Distiller(called, teacher=teacher)
    with pytest.raises(TapError, match="before the first compiled call"):
        steps(student, called, distiller, 1)


def test_a_compiled_student_in_validation_keeps_no_features(backend):
    student, teacher = models()
    distiller = Distiller(student, teacher=teacher)
    called = torch.compile(student, backend=backend)
    with torch.no_grad():
        called(batch()[0])
    with pytest.raises(TapError, match="did not fire"):
        distiller.taps.pop()


def test_sources_are_the_modules_that_return_what_the_head_receives():
    assert find_sources(TinyDetector(), TAPS) == ["neck.out.0", "neck.out.1", "neck.out.2"]
    assert find_sources(TinyDetector(), [Tap("neck.out.0"), Tap("neck", "output", (1,))]) == ["neck.out.0", None]


@new_compiler
def test_a_fullgraph_student_distils(backend):
    student, teacher = models()
    distiller = Distiller(student, teacher=teacher)
    called = torch.compile(student, backend=backend, fullgraph=True)
    assert float(steps(student, called, distiller)[-1][0]) > 0


# the teacher


@pytest.fixture
def compile_with(monkeypatch):
    def use(backend):
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))

    return use


@new_compiler
def test_a_compiled_teacher_gives_the_same_features_in_one_graph(backend, compile_with):
    teacher = models()[1]
    images = batch()[0]
    expected = plain_features(teacher, images)
    compile_with(backend)
    frozen = FrozenTeacher(teacher, TAPS, TeacherConfig(compile=True))
    for _ in range(2):
        torch.testing.assert_close(frozen.features(images), expected, rtol=0, atol=0)
    assert backend.graphs == 1
    frozen.release()
    assert not any(module._forward_pre_hooks for module in teacher.modules())


@new_compiler
def test_a_teacher_that_does_not_compile_runs_as_it_is_and_says_so_once(compile_with, caplog):
    def broken(graph, inputs, **_):
        raise RuntimeError("no compiler here")

    teacher = models()[1]
    expected = plain_features(teacher, batch()[0])
    compile_with(broken)
    frozen = FrozenTeacher(teacher, TAPS, TeacherConfig(compile=True))
    with caplog.at_level(logging.WARNING, "fgd_hooks"):
        found = [frozen.features(batch()[0]) for _ in range(2)]
    torch.testing.assert_close(found, [expected, expected], rtol=0, atol=0)
    assert [record.message.count("compiling failed") for record in caplog.records] == [1]
    assert "no compiler here" in caplog.text


def test_an_error_of_the_teacher_itself_is_no_matter_of_compiling(backend, compile_with, caplog):
    compile_with(backend)
    frozen = FrozenTeacher(models()[1], TAPS, TeacherConfig(compile=True))
    with pytest.raises(RuntimeError, match="channels"):
        frozen.features(torch.zeros(1, 5, 64, 64))
    assert "compiling failed" not in caplog.text


@pytest.mark.slow
def test_a_teacher_compiled_by_inductor_gives_the_same_features():
    teacher = models()[1]
    expected = plain_features(teacher, batch()[0])
    found = FrozenTeacher(teacher, TAPS, TeacherConfig(compile=True)).features(batch()[0])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_inference_tensors_could_not_teach():
    """Why the teacher runs under no_grad: the loss keeps its features for the backward pass."""
    from fgd_hooks.losses.fgd import FGDLoss

    student = torch.randn(1, 4, 3, 3, requires_grad=True)
    with torch.inference_mode():
        teacher = torch.randn(1, 4, 3, 3)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        FGDLoss(4)(student, teacher, [torch.zeros(0, 4)], (24, 24))


@new_compiler
@pytest.mark.parametrize("compiled", [False, True])
def test_the_teachers_features_do_not_outlive_the_step(compiled, backend, compile_with, monkeypatch):
    compile_with(backend)
    student, teacher = models()
    distiller = Distiller(student, teacher=teacher, config=FGDConfig(teacher=TeacherConfig(compile=compiled)))
    alive: list[weakref.ref] = []
    features = distiller._teachers[0].features

    def watched(images):
        found = features(images)
        alive.extend(weakref.ref(feature) for feature in found)
        return found

    monkeypatch.setattr(distiller._teachers[0], "features", watched)
    distilled = None
    for number in range(3):
        images, boxes = batch(number)
        task = student(images)["scores"].square().mean()
        distilled = distiller(images, boxes)
        (task + distilled.loss).backward()
        # the result is still held: only its graph has gone with the backward pass
        gc.collect()
        assert len(alive) == 3 * (number + 1)
        assert all(reference() is None for reference in alive)


# Ultralytics


class WithLoss(nn.Linear):
    def loss(self, batch, preds=None):
        return preds, {"task": 1.0}


def test_the_replaced_loss_adds_in_training_only_and_leaves_no_trace_in_copies():
    pytest.importorskip("ultralytics")
    from fgd_hooks.integrations.ultralytics.compat import DistillingLoss, drop_loss

    model = WithLoss(2, 2)
    handle = DistillingLoss(model, lambda batch, output: ("added", output))
    assert model.loss({}, 3) == ("added", (3, {"task": 1.0}))
    with torch.no_grad():
        assert model.loss({}, 3) == (3, {"task": 1.0})
    model.eval()
    assert model.loss({}, 3) == (3, {"task": 1.0})
    model.train()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin.loss, types.MethodType)
        assert twin.loss.__self__ is twin
        assert twin.loss({}, 3) == (3, {"task": 1.0})
        drop_loss(twin)
        assert "loss" not in vars(twin)
    handle.remove()
    assert "loss" not in vars(model)


@pytest.fixture
def host(train, teacher_file, monkeypatch):
    """``host(name, compile_model, **settings)``: a training whose model goes through ``compile_model``."""
    from ultralytics.engine import trainer as engine

    from fgd_hooks import FGDCallback

    def run(name, compile_model=lambda model: model, **settings):
        torch.compiler.reset()
        seen = []

        def look(trainer):
            parts = {key: float(value) for key, value in {**trainer.loss_items, **trainer.loss_items.parts}.items()}
            seen.append((parts, callback.distiller(trainer).balance.ratios.tolist()))

        monkeypatch.setattr(engine, "attempt_compile", lambda model, device, mode: compile_model(model))
        callback = FGDCallback(teacher_file, schedule={"stop": None})
        return train(callback, name=name, seed=5, hooks=[("on_train_batch_end", look)], **settings), seen

    return run


def assert_nothing_left(yolo):
    from ultralytics import YOLO

    model = unwrap(yolo.trainer.model)
    assert "loss" not in vars(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("loss" in vars(module) for module in YOLO(yolo.trainer.last).model.modules())


@pytest.mark.slow
def test_ultralytics_way_of_calling_a_compiled_model_gives_the_same_training(host):
    """Ultralytics calls model and loss apart when ``compile=True``, here without a compiler."""
    _, expected = host("eager")
    yolo, found = host("apart", compile=True)
    for (parts, ratios), (e_parts, e_ratios) in zip(found, expected, strict=True):
        assert parts == pytest.approx(e_parts, rel=1e-6)
        assert ratios == pytest.approx(e_ratios, rel=1e-6, nan_ok=True)
    assert found[-1][0]["fgd_fg"] > 0
    assert_nothing_left(yolo)


@pytest.mark.slow
def test_ultralytics_with_a_compiled_model_distils_like_the_uncompiled_training(host, backend):
    _, expected = host("eager")
    yolo, found = host("compiled", lambda model: torch.compile(model, backend=backend), compile=True)
    assert backend.graphs >= 1
    assert hasattr(yolo.trainer.model, "_orig_mod")
    for (parts, ratios), (e_parts, e_ratios) in zip(found, expected, strict=True):
        assert parts == pytest.approx(e_parts, rel=1e-2, abs=1e-5)
        assert ratios == pytest.approx(e_ratios, rel=1e-1, nan_ok=True)
    assert found[-1][0]["fgd_fg"] > 0
    assert_nothing_left(yolo)


def test_an_old_torch_does_not_compile_the_teacher_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.4.1"))
    teacher = FrozenTeacher(trained(TinyDetector()), [Tap("neck", "output", (0,))], TeacherConfig(compile=True))
    assert "needs torch 2.6 (found 2.4.1)" in caplog.text
    assert teacher.features(batch()[0])[0].ndim == 4
