"""Mixed precision in a loop of one's own; GradScaler and float16 autocast work on the CPU too."""

import pytest
import torch

from fgd_hooks import Distiller
from tests.helpers.tiny import TinyDetector, batch, trained

FIXED = {"balance": {"mode": "fixed"}}


def models():
    torch.manual_seed(0)
    return trained(TinyDetector((8, 12, 16))), trained(TinyDetector((8, 16, 24)), seed=1)


def forward(student, distiller, dtype):
    images, boxes = batch()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        task = (student(images)["scores"].float() - 1).square().mean()
        distilled = distiller(images, boxes)
    return task, distilled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_and_close_to_full_precision(dtype):
    student, teacher = models()
    distiller = Distiller(student, teacher=teacher, config=FIXED)
    _, wide = forward(student, distiller, None)
    _, narrow = forward(student, distiller, dtype)
    assert narrow.loss.dtype == torch.float32
    for level, parts in wide.raw.items():
        for part, value in parts.items():
            found = narrow.raw[level][part]
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, value, rtol=0.1, atol=1e-3)


def test_a_loss_scaler_does_not_overflow_the_adapters():
    """A gradient of 10 at an adapter's weight is 655,360 under the usual scale, more than float16 can hold."""
    student, teacher = models()
    distiller = Distiller(student, teacher=teacher, config={**FIXED, "weight": 1e4, "adapter": "aligned"})
    weights = [adapter.weight for adapter in distiller.adapters.values() if hasattr(adapter, "weight")]
    _, distilled = forward(student, distiller, None)
    wanted = torch.autograd.grad(distilled.loss, weights)
    assert max(float(gradient.abs().max()) for gradient in wanted) > 10
    _, distilled = forward(student, distiller, torch.float16)
    found = torch.autograd.grad(distilled.loss * 65536, weights)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one / 65536, other, rtol=0.05, atol=0.02 * float(other.abs().max()))


def test_an_overflowing_step_is_skipped_by_student_and_adapters_alike():
    student, teacher = models()
    distiller = Distiller(student, teacher=teacher, config={"balance": {"interval": 2}})
    trained_ones = [*student.parameters(), *distiller.parameters()]
    optimizer = torch.optim.AdamW(trained_ones, 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100, backoff_factor=2.0**-20)
    skipped, stepped = 0, 0
    for _ in range(12):
        task, distilled = forward(student, distiller, torch.float16)
        before = [parameter.detach().clone() for parameter in trained_ones]
        scaler.scale(task + distilled.loss).backward()
        overflowed = any(p.grad is not None and not p.grad.isfinite().all() for p in student.parameters())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        same = [torch.equal(a, b) for a, b in zip(before, trained_ones, strict=True)]
        if overflowed:
            skipped += 1
            assert all(same), "neither student nor adapters move"
        else:
            stepped += 1
            assert not all(same)
        assert all(parameter.isfinite().all() for parameter in trained_ones)
        assert distiller.balance.scales.isfinite().all()
    assert skipped >= 3
    assert stepped >= 3
    assert not distiller.balance.unmeasured, "the balance measures once the gradients are finite"
    assert distiller.skipped_steps == 0, "the distillation loss itself was finite all the time"


def test_the_scalers_factor_cancels_in_the_balance():
    found = []
    for scale in (1.0, 2.0**10):
        student, teacher = models()
        distiller = Distiller(student, teacher=teacher)
        for _ in range(3):
            task, distilled = forward(student, distiller, None)
            ((task + distilled.loss) * scale).backward()
        found.append(distiller.balance.scales.clone())
    assert torch.equal(*found)
    assert not torch.equal(found[0], torch.ones(3))
