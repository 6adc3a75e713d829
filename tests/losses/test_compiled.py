"""The heavy passes compiled: the same numbers, chosen by a trial, and never in the way."""

import copy
import logging
import math
import pickle
from types import SimpleNamespace

import pytest
import torch

from fgd_hooks.losses import compiled
from fgd_hooks.losses.compiled import AS_THEY_ARE, TRIED_AT, Choice, compiled_passes
from fgd_hooks.losses.fgd import FGDLoss
from tests.losses.test_golden import CASES, Golden

BOXES = [torch.tensor([[0.0, 0.0, 20.0, 12.0], [8.0, 8.0, 30.0, 40.0]]), torch.zeros(0, 4)]


@pytest.fixture(autouse=True)
def fresh():
    """Each test compiles anew: torch keeps only so many versions of one function."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def both(channels=6, **options):
    """The same loss as it is and compiled, with context blocks that are not at their zero start."""
    torch.manual_seed(0)
    plain = FGDLoss(channels, compiled=False, **options).double()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    other = FGDLoss(channels, compiled=True, **options).double()
    other.load_state_dict(plain.state_dict())
    return plain, other


def results(loss, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(2, 6, 5, 7, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    teacher = torch.randn(2, 6, 5, 7, generator=generator, dtype=torch.float64).to(dtype)
    found = loss(student, teacher, BOXES, (40, 56))
    found.loss.backward()
    return {
        **found.parts,
        "student": student.grad,
        **{name: p.grad for name, p in loss.named_parameters() if p.grad is not None},
    }


@pytest.mark.parametrize("options", [{}, {"lambda_": 0.0}, {"alpha": 0.0, "beta": 0.0}, {"gamma": 0.0}])
def test_traced_passes_give_the_same_parts_and_gradients(monkeypatch, options):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    plain, other = both(**options)
    wanted, found = results(plain), results(other)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in CASES if not case["negative_box_coordinate"]][::8], ids=lambda case: case["id"]
)
def test_compiled_code_passes_the_golden_cases(case):
    golden = Golden(case, torch.float32)
    golden.loss.choice = Choice(True)
    inputs = {"student": golden.student, **golden.parameters}
    result = golden.loss(golden.adapted, golden.teacher, golden.boxes, golden.canvas)
    golden.compare(result.loss, "out/loss")
    found = torch.autograd.grad(result.loss, inputs.values())
    for name, gradient in zip(inputs, found, strict=True):
        golden.compare(gradient, f"grad/{name}", torch.from_numpy(golden.arrays[f"grad/{name}"]).view(gradient.shape))


def on_gpu(*shape):
    """What the choice looks at of a feature on a GPU."""
    count = math.prod(shape)
    device = torch.device("cuda")
    return SimpleNamespace(device=device, shape=shape, dtype=torch.float32, stride=lambda: shape, numel=lambda: count)


def test_nothing_is_tried_on_a_cpu():
    choice = Choice(None)
    for _ in range(2 * TRIED_AT):
        assert choice.passes(torch.zeros(1, 2, 3, 3), lambda passes: pytest.fail("tried")) is AS_THEY_ARE


@pytest.mark.parametrize("pays", [True, False])
def test_on_a_gpu_the_faster_way_stays_after_a_trial_for_each_size(monkeypatch, pays):
    monkeypatch.setattr(
        compiled, "seconds", lambda trial, passes, device: 1.0 if (passes is AS_THEY_ARE) == pays else 0.5
    )
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    choice, tried = Choice(None), []
    for _ in range(TRIED_AT - 1):
        assert choice.passes(on_gpu(8, 64, 80, 80), tried.append) is AS_THEY_ARE
    assert not tried
    for _ in range(3):
        wanted = choice.compiled() if pays else AS_THEY_ARE
        assert choice.passes(on_gpu(8, 64, 80, 80), tried.append) is wanted
    assert len(tried) == 1  # it compiles once; the times come from what is patched here
    assert choice.passes(on_gpu(8, 64, 40, 40), tried.append) is AS_THEY_ARE


def test_a_compiler_that_fails_changes_nothing_and_is_no_warning(monkeypatch, caplog):
    def fail(passes):
        raise RuntimeError("no compiler here")

    choice = Choice(None)
    with caplog.at_level(logging.INFO):
        for _ in range(TRIED_AT + 2):
            assert choice.passes(on_gpu(8, 64, 80, 80), fail) is AS_THEY_ARE
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "trying whether" in caplog.text  # a compiler may take a minute


def test_where_a_run_must_be_repeatable_the_size_decides_and_no_clock(monkeypatch):
    monkeypatch.setattr(compiled, "seconds", lambda *arguments: pytest.fail("timed"))
    choice, tried = Choice(None), []
    torch.use_deterministic_algorithms(True, warn_only=True)  # as Ultralytics does by default
    try:
        for _ in range(TRIED_AT):
            small = choice.passes(on_gpu(8, 64, 20, 20), tried.append)
            large = choice.passes(on_gpu(16, 64, 80, 80), tried.append)
    finally:
        torch.use_deterministic_algorithms(False)
    assert small is AS_THEY_ARE
    assert large is choice.compiled()
    assert tried == [large]


def test_maps_of_many_sizes_are_compiled_twice_a_level(monkeypatch):
    """One code for all levels would be compiled at most eight times, and run as it is from then on."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    monkeypatch.setattr(compiled, "BACKEND", counter)
    for channels in (4, 6, 8):  # levels
        loss, graphs = FGDLoss(channels, compiled=True), counter.frame_count
        for number, (height, width) in enumerate([(5, 7), (6, 9), (8, 4), (9, 9), (3, 11), (12, 5), (7, 8), (10, 6)]):
            student = torch.randn(2, channels, height, width, requires_grad=True)
            loss(student, torch.randn(2, channels, height, width), BOXES, (40, 56)).loss.backward()
            if number == 3:
                settled = counter.frame_count
        assert graphs < settled == counter.frame_count


def test_the_trial_of_a_loss_leaves_no_gradient_and_runs_both_ways(monkeypatch):
    """The trial itself, as a loss hands it over: forward and backward on copies."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    loss = FGDLoss(6)
    student = torch.randn(2, 6, 5, 7, requires_grad=True)
    ran = []

    def passes(self, feature, trial):
        for way in (AS_THEY_ARE, compiled_passes("aot_eager")):
            trial(way)
            ran.append(way)
        return AS_THEY_ARE

    monkeypatch.setattr(Choice, "passes", passes)
    with torch.no_grad():  # also where no gradient is recorded
        loss(student, torch.randn(2, 6, 5, 7), BOXES, (40, 56))
    assert len(ran) == 2
    assert student.grad is None and all(parameter.grad is None for parameter in loss.parameters())


def test_a_choice_travels_with_copies_and_pickles():
    loss = FGDLoss(6, compiled=True)
    loss.choice.found["size"] = True
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert copied.choice.wanted is True and copied.choice.found == {"size": True}
