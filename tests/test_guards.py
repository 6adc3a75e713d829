import logging
import math

import pytest
import torch
from torch import nn

from fgd_hooks.config import FGDConfig, load_config
from fgd_hooks.errors import NonFiniteError
from fgd_hooks.guards import DOMINANT, DOMINANT_STEPS, IDLE_FROM, IDLE_STEPS, GradientGuard, StepHealth


def feed(health, ratios):
    for ratio in ratios:
        health.compare(torch.tensor(3.0 * ratio), torch.tensor(3.0))


def warnings(caplog):
    return [record.message for record in caplog.records if "more than 10 times" in record.message]


def test_a_dominating_loss_warns_once_with_the_numbers_and_the_knob(caplog):
    health = StepHealth(load_config({"balance": {"ratio": 7.0}}))
    feed(health, [DOMINANT * 1.5] * (DOMINANT_STEPS - 1))
    assert not warnings(caplog)
    feed(health, [DOMINANT * 1.5] * 300)
    (text,) = warnings(caplog)
    assert "For 100 steps" in text
    assert "now 45" in text
    assert "(3)" in text
    assert text.endswith("Lower balance.ratio (7).")


def test_fixed_weights_have_another_knob(caplog):
    health = StepHealth(load_config({"weight": 5.0, "balance": {"mode": "fixed"}}))
    feed(health, [100.0] * 100)
    assert "Lower weight (5), or let balance.mode=gradient" in warnings(caplog)[0]


@pytest.mark.parametrize(
    "ratios",
    [[DOMINANT * 0.99] * 400, ([20.0] * 99 + [1.0]) * 5, [math.nan] * 300],
    ids=["not ten times", "not in a row", "not finite"],
)
def test_no_warning_where_it_does_not_dominate(caplog, ratios):
    feed(StepHealth(FGDConfig()), ratios)
    assert not warnings(caplog)


def test_two_hundred_steps_are_found_wherever_they_begin(caplog):
    health = StepHealth(FGDConfig())
    feed(health, [1.0] * 37 + [50.0] * 200)
    assert len(warnings(caplog)) == 1


def test_bad_steps_are_counted_and_too_many_in_a_row_end_the_training(caplog):
    caplog.set_level(logging.WARNING)
    health = StepHealth(load_config({"max_bad_steps": 3}))
    for finite in (True, False, False, True, False, False):
        health.count(torch.tensor(finite))
    assert health.skipped == 4
    assert [record.message.split(":")[0] for record in caplog.records] == ["Distilling step 2", "Distilling step 5"]
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        health.count(torch.tensor(False))


@pytest.mark.parametrize("finite", [True, False])
def test_the_guard_lets_a_gradient_through_or_not(finite):
    guard = GradientGuard()
    feature = torch.ones(1, 2, 3, 3, requires_grad=True)
    watched = guard.watch(feature)
    guard.finite = torch.tensor(finite)
    (watched * 2).sum().backward()
    assert torch.equal(feature.grad, torch.full_like(feature, 2.0 * finite))


@pytest.mark.parametrize("bad", [1.0, math.inf, math.nan])
def test_parameters_get_zeros_where_one_value_is_not_finite(bad):
    one, other, unused = (torch.ones(3, 2, dtype=kind, requires_grad=True) for kind in (torch.float32,) * 3)
    double = torch.ones(2, dtype=torch.float64, requires_grad=True)
    guard = GradientGuard([one, other, unused, double])
    loss = (one * torch.tensor([2.0, bad])).sum() + (other * 3).sum() + (double * 5).sum()
    guard.watch_parameters(loss)
    (loss + one.sum()).backward()
    kept = float(math.isfinite(bad))
    assert torch.equal(one.grad, torch.tensor([3.0, 2.0]).expand(3, 2) * kept)
    assert torch.equal(other.grad, torch.full((3, 2), 3.0 * kept))
    assert unused.grad is None
    assert torch.equal(double.grad, torch.full((2,), 5.0, dtype=torch.float64)), "another type is looked at apart"


def test_parameters_that_no_optimizer_steps_are_said(caplog):
    def train(optimizer):
        health = StepHealth(FGDConfig())
        for _ in range(IDLE_FROM + IDLE_STEPS):
            health.count(torch.tensor(True), parameters)
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer and optimizer.step()

    parameters = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    for settings in ({}, {"foreach": True}, {"fused": True}):
        train(torch.optim.AdamW(parameters, **settings))
        assert not caplog.records, settings
    train(None)
    assert "any of the 6 parameters" in caplog.text
