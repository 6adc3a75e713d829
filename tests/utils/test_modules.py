import torch
from torch import nn

from fgd_hooks.utils.modules import own_tensors


def test_own_tensors_are_those_that_a_checkpoint_holds():
    module = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False))
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("cache", torch.zeros(1), persistent=False)
    assert list(own_tensors(module)) == ["kept"]
    assert list(own_tensors(module[0])) == ["weight"]
