"""The global context block."""

from __future__ import annotations

import pytest
import torch

from fgd_hooks.losses.gc_block import GcBlock, pool
from tests.helpers.reference import slow_context


def block(channels=6, seed=0):
    torch.manual_seed(seed)
    made = GcBlock(channels).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def test_identity_at_first():
    feature = torch.randn(2, 6, 3, 4)
    assert torch.equal(GcBlock(6)(feature), feature)


def test_initial_values():
    torch.manual_seed(0)
    made = GcBlock(400)
    assert made.expand.weight.abs().max() == 0 and made.expand.bias.abs().max() == 0
    assert made.attend.bias is None
    assert float(made.attend.weight.detach().std()) == pytest.approx((2 / 400) ** 0.5, rel=0.15)
    assert made.norm.weight.eq(1).all() and made.reduce.weight.abs().max() <= 1 / 20


@pytest.mark.parametrize("channels", [2, 5, 6])
def test_equal_to_the_paper(channels):
    made, feature = block(channels), torch.randn(2, channels, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(made(feature), slow_context(feature, made), rtol=1e-12, atol=1e-12)


def test_pool_of_one_bright_cell():
    made = block(2)
    with torch.no_grad():
        made.attend.weight.fill_(1.0)
    feature = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    feature[0, :, 1, 0] = 100.0
    torch.testing.assert_close(pool(feature, made.attend.weight), torch.full((1, 2), 100.0, dtype=torch.float64))


def test_gradients():
    made, feature = block(4), torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in made.named_parameters()]

    def call(x, *values):
        return torch.func.functional_call(made, dict(zip(names, values, strict=True)), (x,))

    values = [parameter.detach().requires_grad_() for parameter in made.parameters()]
    assert torch.autograd.gradcheck(call, (feature, *values), fast_mode=True)


def test_order_of_weights():
    made = block(6)
    shapes = [tuple(weight.shape) for weight in made.weights()]
    assert shapes == [(1, 6), (3, 6), (3,), (3,), (3,), (6, 3), (6,)]
    assert {id(w) for w in made.weights()} == {id(p) for p in made.parameters()}


def test_one_channel_is_too_few():
    with pytest.raises(ValueError, match="channels"):
        GcBlock(1)
