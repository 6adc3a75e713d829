import pytest

from fgd_hooks.errors import UnknownNameError
from fgd_hooks.utils.registry import Registry, suggestion


def test_create_calls_the_factory_with_the_arguments():
    registry = Registry("thing")

    @registry.register("pair")
    def pair(a, b=0):
        return a, b

    assert registry.create("pair", 1, b=2) == (1, 2)
    assert pair(3) == (3, 0), "the decorator returns the factory unchanged"
    assert registry.names() == ["pair"]
    assert "pair" in registry


def test_unknown_name_lists_the_nearest():
    registry = Registry("thing")
    registry.register("conv1x1")(int)
    registry.register("mlp")(int)
    with pytest.raises(UnknownNameError, match=r"no thing 'conv1x2'.*'conv1x1'"):
        registry.get("conv1x2")
    with pytest.raises(KeyError, match="Known are: conv1x1, mlp"):
        registry.get("zzz")


def test_far_names_get_no_suggestion_and_no_long_list():
    known = [f"model.{number}.conv" for number in range(99)]
    assert suggestion("model.100.conv", known).startswith("Did you mean 'model.")
    assert suggestion("conv", known) == "Did you mean 'model.0.conv' or 'model.1.conv' or 'model.2.conv'?"
    assert suggestion("zzz", known) == "None of the 99 is near."


def test_a_name_is_taken_once():
    registry = Registry("thing")
    registry.register("a")(int)
    registry.register("a")(int)
    with pytest.raises(ValueError, match="taken"):
        registry.register("a")(float)


def test_registries_do_not_share_entries():
    one, other = Registry("one"), Registry("other")
    one.register("a")(int)
    assert other.names() == []
