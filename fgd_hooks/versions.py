"""Version numbers, compared as numbers."""

from __future__ import annotations

import re


def version_numbers(version: str) -> tuple[int, ...]:
    """``(2, 15, 0)`` for ``"2.15.0+cpu"``: the first three numbers in a version's text."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
