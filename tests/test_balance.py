import math

import pytest
import torch

from fgd_hooks.balance import Balance, limit_images
from fgd_hooks.config import BalanceConfig


def gradient(**changes):
    return Balance(BalanceConfig(mode="gradient", **changes), 2)


def tensor(*values):
    return torch.tensor(values)


def measure(balance, task_gradients, distillation_gradients, weight=1.0):
    """One step whose gradients at two features are known vectors."""
    assert balance.next_step()
    features = [torch.zeros(3, requires_grad=True) * 1.0 for _ in range(2)]
    leaves = balance.observe(features, weight)
    task = sum((f * g).sum() for f, g in zip(features, task_gradients, strict=True))
    losses = torch.stack([(f * g).sum() for f, g in zip(leaves, distillation_gradients, strict=True)])
    (task + (losses * balance.trial(losses) * weight).sum()).backward()


def test_fixed_is_one_and_never_measures():
    balance = Balance(BalanceConfig(mode="fixed"), 3)
    assert torch.equal(balance.factors, torch.ones(3))
    assert not any(balance.next_step() for _ in range(50))


def test_the_scale_makes_the_gradient_norms_meet_the_ratio():
    balance = gradient(ratio=0.5)
    measure(balance, [tensor(3.0, 4.0, 0.0), tensor(0.0, 0.0, 2.0)], [tensor(0.0, 0.1, 0.0), tensor(8.0, 6.0, 0.0)])
    balance.next_step()
    # |task| = 5 and 2, |distillation| = 0.1 and 10: 0.5 * 5 / 0.1 and 0.5 * 2 / 10
    assert balance.factors.tolist() == pytest.approx([25.0, 0.1])
    assert balance.ratios.tolist() == pytest.approx([0.1 / 5, 10 / 2]), "ratios with the scales then in use, 1"


def test_the_cosine_between_the_two_gradients():
    balance = gradient()
    assert all(math.isnan(value) for value in balance.cosines)
    measure(balance, [tensor(3.0, 4.0, 0.0), tensor(0.0, 0.0, 2.0)], [tensor(-6.0, -8.0, 0.0), tensor(0.0, 3.0, 3.0)])
    balance.next_step()
    assert balance.cosines.tolist() == pytest.approx([-1.0, 1 / math.sqrt(2)])
    balance.observe([torch.zeros(3, requires_grad=True) * 1.0] * 2, 1.0)
    balance.close()
    assert balance.cosines.tolist() == pytest.approx([-1.0, 1 / math.sqrt(2)]), "no backward pass came along"


def test_one_scale_for_all_levels():
    balance = gradient(ratio=1.0, per_level=False)
    measure(balance, [tensor(3.0, 0.0, 0.0), tensor(0.0, 4.0, 0.0)], [tensor(6.0, 0.0, 0.0), tensor(0.0, 8.0, 0.0)])
    balance.next_step()
    assert balance.factors.tolist() == pytest.approx([0.5, 0.5])


def test_the_users_weight_is_not_balanced_away():
    balance = gradient(ratio=1.0)
    measure(balance, [tensor(4.0, 0, 0)] * 2, [tensor(2.0, 0, 0)] * 2, weight=10.0)
    balance.next_step()
    assert balance.factors.tolist() == pytest.approx([2.0, 2.0])


def test_a_loss_scaler_changes_nothing():
    balance = gradient(ratio=1.0)
    assert balance.next_step()
    feature = torch.zeros(3, requires_grad=True) * 1.0
    leaves = balance.observe([feature, feature * 1.0], 1.0)
    loss = (feature * 4).sum() + sum((leaf * 2).sum() for leaf in leaves)
    (65536 * loss).backward()
    balance.next_step()
    assert float(balance.factors[0]) == pytest.approx(2.0)


def test_nothing_is_used_before_it_is_measured():
    balance = gradient()
    assert balance.next_step()
    assert balance.factors.tolist() == [0.0, 0.0]
    measure(balance, [tensor(1.0, 0, 0), tensor(0.0, 0, 0)], [tensor(1.0, 0, 0)] * 2)
    balance.next_step()
    assert balance.factors[0] > 0
    assert balance.factors[1] == 0, "no task gradient was seen there yet"


def test_the_first_steps_measure_more_often_and_then_every_interval():
    balance = gradient(interval=5)
    assert [balance.next_step() for _ in range(16)] == [s in (0, 1, 4, 5, 8, 10, 15) for s in range(16)]
    balance = gradient(interval=10)
    assert [balance.next_step() for _ in range(31)] == [s in (0, 1, 4, 8, 10, 20, 30) for s in range(31)]


def test_an_unmeasured_level_is_tried_with_a_loss_of_one():
    balance = gradient(ratio=0.5)
    assert balance.next_step()
    features = [torch.zeros(3, requires_grad=True) * 1.0 for _ in range(2)]
    leaves = balance.observe(features, 2.0)
    losses = torch.stack([(leaf * 600).sum() + value for leaf, value in zip(leaves, (4000.0, 0.0), strict=True)])
    used = balance.trial(losses)
    assert used.tolist() == pytest.approx([1 / 4000, 1.0]), "a loss of 0 has no size"
    (sum((f * 300).sum() for f in features) + (losses * used * 2.0).sum()).backward()
    balance.next_step()
    assert balance.factors.tolist() == pytest.approx([0.25, 0.25]), "whatever was tried, 0.5 * 300 / 600"
    assert balance.ratios.tolist() == pytest.approx([2.0, 2.0]), "with the scale before, 1"
    assert balance.trial(losses).tolist() == pytest.approx([0.25, 0.25])


def test_a_measurement_without_backward_is_dropped():
    balance = gradient()
    balance.next_step()
    balance.observe([torch.zeros(3, requires_grad=True) * 1.0] * 2, 1.0)
    balance.next_step()
    assert balance.factors.tolist() == [0.0, 0.0]


def called(balance, losses):
    """One call of a distiller; its loss is added to those of the calls that share a backward pass."""
    feature = torch.ones(3, requires_grad=True) * 1.0
    used = features = [feature, feature * 1.0]
    if measuring := balance.next_step():
        used = balance.observe(used, 1.0)
    loss = sum((each * 3).sum() for each in used)
    losses.append((sum(features) * 6).sum() + (loss * balance.trial(loss.expand(2)).sum() if measuring else loss * 0))
    return measuring


@pytest.mark.parametrize("calls", [2, 4, 20])
def test_calls_that_share_a_backward_pass_are_measured(calls, caplog):
    balance, measured = gradient(), 0
    for _ in range(40 // calls):
        losses = []
        measured += sum(called(balance, losses) for _ in range(calls))
        sum(losses).backward()
    balance.close()
    assert measured >= 2
    assert torch.equal(balance._measured, torch.full((2,), float(measured)))
    assert not caplog.records


def test_measurements_without_a_backward_pass_are_said(caplog):
    balance = gradient()
    for _ in range(11):
        called(balance, [])
    assert "No backward pass has reached the last 3 measurement(s)" in caplog.text
    assert balance.factors.tolist() == [0, 0]
    called(kept := gradient(interval=100), losses := [])
    for _ in range(299):
        assert not called(kept, losses), "its graph is alive: the backward pass may come"
    caplog.clear()
    assert called(kept, losses)
    assert "300 calls ago" in caplog.text


def test_a_gradient_in_pieces_measures_nothing_and_is_said(caplog):
    balance = gradient()
    for _ in range(2):
        assert balance.next_step()
        feature = torch.zeros(3, requires_grad=True) * 1.0
        leaves = balance.observe([feature, feature * 1.0], 1.0)
        ((feature * 1000).sum() + sum(leaf.sum() for leaf in leaves)).backward(retain_graph=True)
        feature.sum().backward()
    balance.close()
    assert balance.factors.tolist() == [0, 0], "the last piece alone is a thousandth of the gradient"
    assert caplog.text.count("Several backward passes") == 1
    assert all(math.isnan(value) for value in balance.cosines)


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_frozen_when_a_norm_is_zero_or_not_finite(bad):
    balance = gradient(ratio=1.0)
    balance.update(tensor(2.0, 2.0), tensor(1.0, 1.0))
    balance.update(tensor(bad, 2.0), tensor(1.0, bad))
    assert balance.scales.tolist() == [2.0, 2.0]


def test_bounds_and_largest_change():
    balance = gradient(ratio=1.0, min_scale=0.01, max_scale=100.0, max_change=2.0, momentum=0.0)
    balance.update(tensor(1e9, 1e-9), tensor(1.0, 1.0))
    assert balance.scales.tolist() == pytest.approx([100.0, 0.01])
    balance.update(tensor(1.0, 1.0), tensor(1.0, 1.0))
    assert balance.scales.tolist() == pytest.approx([1.0, 0.02]), "one measurement raises it by at most 2"


def test_moving_average_is_of_the_logarithm_and_begins_with_the_plain_mean():
    balance = gradient(ratio=1.0, momentum=0.75, max_change=1e6)
    for scale in (1.0, 16.0, 2.0):
        balance.update(tensor(scale, 1.0), tensor(1.0, 1.0))
    assert float(balance.scales[0]) == pytest.approx((1.0 * 16.0 * 2.0) ** (1 / 3), rel=1e-5)
    for _ in range(3):
        balance.update(tensor(1.0, 1.0), tensor(1.0, 1.0))
    expected = ((1.0 * 16.0 * 2.0) ** (1 / 3)) ** (0.75**3)  # a mean of 3, then 0.75 kept of each
    assert float(balance.scales[0]) == pytest.approx(expected, rel=1e-5)


def test_state_goes_on_where_it_was():
    balance = gradient(interval=5)
    measure(balance, [tensor(1.0, 0, 0)] * 2, [tensor(2.0, 0, 0)] * 2)
    balance.next_step()
    twin = gradient(interval=5)
    twin.load_state_dict(balance.state_dict())
    assert torch.equal(twin.factors, balance.factors)
    assert [twin.next_step() for _ in range(9)] == [balance.next_step() for _ in range(9)]
    with pytest.raises(ValueError, match="2 levels.* 3"):
        Balance(BalanceConfig(), 3).load_state_dict(balance.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_no_image_weighs_more_than_so_many_times_the_median_one(dtype):
    torch.manual_seed(0)
    gradient = torch.randn(5, 3, 4, 4)
    gradient /= gradient.flatten(1).norm(dim=1)[:, None, None, None]
    norms = torch.tensor([1.0, 3.0, 2.0, 500.0, 7.0])
    gradient = (gradient * norms[:, None, None, None]).to(dtype)
    limited = limit_images(gradient, 2.0)
    assert limited.dtype == dtype
    assert limited.flatten(1).double().norm(dim=1).tolist() == pytest.approx([1, 3, 2, 6, 6], rel=1e-3)
    assert torch.equal(limited[:3], gradient[:3]), "the others to the last bit"
    cosine = torch.nn.functional.cosine_similarity(limited.flatten(1).double(), gradient.flatten(1).double())
    assert cosine.tolist() == pytest.approx([1.0] * 5, abs=1e-5)
    one = gradient[3:4]
    assert torch.equal(limit_images(one, 2.0), one), "alone it is the median"


def test_images_without_a_gradient_or_with_one_that_is_not_finite_limit_nothing():
    gradient = torch.zeros(3, 1, 2, 2)
    gradient[1] = 5.0
    assert torch.equal(limit_images(gradient, 2.0), gradient), "the median is 0"
    gradient = torch.tensor([1.0, math.inf, 3.0, math.nan]).view(4, 1, 1, 1)
    limited = limit_images(gradient, 2.0).flatten()
    assert limited[0] == 1
    assert not torch.isfinite(limited[[1, 3]]).any(), "a loss scaler has to find them"


def test_the_limit_is_on_what_comes_back_through_the_loss_alone():
    feature = torch.ones(3, 1, 2, 2, requires_grad=True)
    weights = torch.tensor([1.0, 1.0, 100.0]).view(3, 1, 1, 1)
    for settings, most in (
        ({}, 2.0),
        ({"image_limit": 3.0}, 3.0),
        ({"image_limit": None}, 100.0),
        ({"mode": "fixed"}, 100.0),
    ):
        balance = Balance(BalanceConfig(**settings), 1)
        ((feature * 7).sum() + (balance.limited(feature) * weights).sum()).backward()
        assert feature.grad[:, 0, 0, 0].tolist() == pytest.approx([8.0, 8.0, 7.0 + most]), settings
        feature.grad = None
    plain = torch.zeros(1, 1, 1, 1)
    assert balance.limited(plain) is plain
