"""``fgd levels``: a model's feature levels, and how a teacher's pair with them, as a table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from fgd_hooks.adapters import automatic_adapter
from fgd_hooks.errors import ConfigError
from fgd_hooks.integrations.load_model import load_model
from fgd_hooks.pairing import LevelPair, pair_levels
from fgd_hooks.taps.levels import Level, find_levels


def levels_command(arguments: argparse.Namespace) -> None:
    """``fgd levels``: probe one model, or two and pair them, and print a table.

    Raises:
        ConfigError: the size of the probe is no multiple of the largest stride.
        ModelNameError, FileNotFoundError, TapError, PairingError: see the functions called.
    """
    names = [arguments.model, *([arguments.teacher] if arguments.teacher else [])]
    pyramids = []
    for name in names:
        model = load_model(name, arguments.imgsz)
        levels = find_levels(model.module, model.taps, example=model.example, role=name)
        if not model.fixed and (
            arguments.imgsz % max(level.stride for level in levels)
            or levels[0].size[0] * levels[0].stride != arguments.imgsz
        ):
            raise ConfigError(f"--imgsz {arguments.imgsz} is no multiple of the largest stride of {name}; try 640.")
        pyramids.append(levels)
    if arguments.teacher:
        pairs = pair_levels(pyramids[0], pyramids[1])
        _print_pairs(arguments.model, arguments.teacher, pyramids, pairs)
    else:
        _print_levels(arguments.model, pyramids[0])


def _table(title: str, columns: Sequence[str]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("level", "tap", "adapter") else "right")
    return table


def _print_levels(name: str, levels: Sequence[Level]) -> None:
    from rich.console import Console

    table = _table(name, ("level", "stride", "channels", "map", "tap"))
    for level in levels:
        size = f"{level.size[0]}x{level.size[1]}"
        table.add_row(level.name, str(level.stride), str(level.channels), size, str(level.tap))
    Console().print(table)


def _print_pairs(student: str, teacher: str, pyramids: Sequence[Sequence[Level]], pairs: Sequence[LevelPair]) -> None:
    from rich.console import Console

    table = _table(f"{student}  <-  {teacher}", ("level", "stride", "student", "teacher", "adapter", "tap"))
    for pair in pairs:
        adapter = automatic_adapter(pair.student.channels, pair.teacher.channels)
        taps = f"{pair.student.tap}  <-  {pair.teacher.tap}"
        channels = str(pair.student.channels), str(pair.teacher.channels)
        table.add_row(pair.name, str(pair.student.stride), *channels, adapter, taps)
    for role, side, used in (
        ("student", pyramids[0], [p.student for p in pairs]),
        ("teacher", pyramids[1], [p.teacher for p in pairs]),
    ):
        for level in side:
            if level not in used:
                row = [str(level.channels), "-"] if role == "student" else ["-", str(level.channels)]
                table.add_row(level.name, str(level.stride), *row, "not distilled", str(level.tap))
    Console().print(table)
