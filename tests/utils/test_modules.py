import pytest

from fgd_hooks.utils.modules import version_numbers


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("2.15.0+cpu", (2, 15, 0)), ("8.4.177", (8, 4, 177)), ("2.6", (2, 6)), ("9.0.0rc1", (9, 0, 0))],
)
def test_numbers(text, numbers):
    assert version_numbers(text) == numbers


def test_they_compare_as_numbers():
    assert version_numbers("2.15.0") > version_numbers("2.6") > version_numbers("2.4.1")
