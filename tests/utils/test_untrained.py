"""Whether a model or a part of it still has the weights that it was built with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fgd_hooks.utils.untrained import is_untrained
from tests.helpers.tiny import TinyDetector, trained
from tests.initialization.test_weight_selection import net


def test_a_pass_in_training_mode_shows_in_the_statistics():
    model = net(2)
    assert is_untrained(model)
    model.eval()(torch.randn(1, 3, 4, 4))
    assert is_untrained(model), "a pass in eval mode leaves no trace"
    model.train()(torch.randn(1, 3, 4, 4))
    assert not is_untrained(model)
    assert not is_untrained(nn.Linear(2, 2)), "nothing is known of it"


def constant_biases() -> nn.Module:
    layer = nn.Conv2d(4, 8, 3)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.constant_(layer.bias, -4.6)
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(8, 16, 3),
        lambda: nn.Linear(32, 32),
        lambda: nn.Linear(32, 32, bias=False),
        constant_biases,
        lambda: nn.GroupNorm(2, 8),
        lambda: nn.LayerNorm(8),
        lambda: nn.BatchNorm2d(4),
    ],
)
def test_one_step_of_an_optimizer_shows(layer):
    torch.manual_seed(0)
    module = layer()
    assert is_untrained(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    if isinstance(module, nn.BatchNorm2d):
        module.running_mean.add_(0.1)
    assert not is_untrained(module)


def test_parts_of_a_model_each_on_its_own():
    model = trained(TinyDetector())
    assert not is_untrained(model)
    assert not is_untrained(model, ["stem", "stages"])
    assert is_untrained(model, ["neck"])
    assert is_untrained(model, ["neck", "head"])
    assert not is_untrained(model, ["stem", "head"]), "one layer that was trained is enough"


class Sharded(torch.Tensor):
    """A tensor that knows few operations."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


def test_of_tensors_of_another_kind_nothing_is_known():
    layer = nn.Linear(32, 32)
    weight = layer.weight.detach().as_subclass(Sharded)
    del layer.weight
    layer.register_buffer("weight", None)
    layer._buffers["weight"] = weight
    assert not is_untrained(nn.Sequential(layer, nn.Identity()))
