import pytest
import torch
from torch import nn

from fgd_hooks.adapters import ADAPTERS, create_adapter, list_adapters, register_adapter
from fgd_hooks.errors import ConfigError


def test_all_map_to_the_teachers_channels():
    x = torch.rand(2, 6, 5, 4)
    for name in ("aligned", "conv1x1", "conv1x1_bn", "mlp", "conv3x3"):
        adapter = create_adapter(name, 6, 10)
        y = adapter(x)
        assert y.shape == (2, 10, 5, 4), name
        y.square().sum().backward()
        assert all(p.grad is not None for p in adapter.parameters()), name


def test_auto_chooses_by_channels():
    assert isinstance(create_adapter("auto", 8, 8), nn.Identity)
    adapter = create_adapter("auto", 8, 16)
    assert isinstance(adapter, nn.Conv2d)
    assert adapter.kernel_size == (1, 1)


@pytest.mark.parametrize(("student", "teacher", "taken"), [(2, 4, [0, 0, 1, 1]), (4, 2, [0, 2]), (3, 4, [0, 0, 1, 2])])
def test_aligned_begins_with_the_students_own_channels(student, teacher, taken):
    x = torch.rand(2, student, 5, 4)
    assert torch.equal(create_adapter("aligned", student, teacher)(x), x[:, taken])


def test_identity_refuses_other_channels():
    with pytest.raises(ConfigError, match=r"student has 8 .*16"):
        create_adapter("identity", 8, 16)


def test_unknown_name():
    with pytest.raises(KeyError, match="conv1x1"):
        create_adapter("conv1", 8, 16)


def test_a_user_registers_one():
    @register_adapter("test_only")
    def build(student_channels, teacher_channels):
        return nn.Conv2d(student_channels, teacher_channels, 5, padding=2)

    try:
        assert "test_only" in list_adapters()
        assert create_adapter("test_only", 3, 4)(torch.rand(1, 3, 6, 6)).shape == (1, 4, 6, 6)
    finally:
        del ADAPTERS._factories["test_only"]


def test_a_factory_must_give_a_module():
    register_adapter("test_wrong")(lambda a, b: None)
    try:
        with pytest.raises(ValueError, match="must return an nn.Module"):
            create_adapter("test_wrong", 3, 4)
    finally:
        del ADAPTERS._factories["test_wrong"]
