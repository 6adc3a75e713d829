import logging
import math

import pytest
import torch

from fgd_hooks.config import FGDConfig, load_config
from fgd_hooks.errors import NonFiniteError
from fgd_hooks.guards import DOMINANT, DOMINANT_STEPS, GradientGuard, StepHealth, zero_unless_finite


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


def test_a_gradient_with_one_bad_value_is_dropped_whole():
    good = torch.tensor([1.0, -2.0])
    assert torch.equal(zero_unless_finite(good), good)
    assert torch.equal(zero_unless_finite(torch.tensor([1.0, math.inf])), torch.zeros(2))
    assert zero_unless_finite(None) is None
