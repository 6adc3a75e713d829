"""``fgd levels``: a model's feature levels, and how a teacher's pair with them, as a table."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.table import Table

from fgd_hooks.adapters import automatic_adapter
from fgd_hooks.errors import ConfigError
from fgd_hooks.integrations.load_model import load_model
from fgd_hooks.pairing import pair_levels
from fgd_hooks.taps.levels import Level, find_levels

Row = Sequence[object]


def levels_command(arguments: argparse.Namespace) -> None:
    """``fgd levels``: probe one model, or two and pair them, and print a table."""
    student, teacher = arguments.model, arguments.teacher
    levels = _probe(student, arguments.imgsz)
    if teacher:
        columns = ("level", "stride", "student", "teacher", "adapter", "tap")
        _print(f"{student}  <-  {teacher}", columns, _pair(levels, _probe(teacher, arguments.imgsz)))
    else:
        rows = [(each.name, each.stride, each.channels, "{}x{}".format(*each.size), each.tap) for each in levels]
        _print(student, ("level", "stride", "channels", "map", "tap"), rows)


def _probe(name: str, size: int) -> list[Level]:
    model = load_model(name, size)
    levels = find_levels(model.module, model.taps, example=model.example, role=name)
    whole = levels[0].size[0] * levels[0].stride == size and not size % max(level.stride for level in levels)
    if not (model.fixed or whole):
        raise ConfigError(f"--imgsz {size} is no multiple of the largest stride of {name}; try 640.")
    return levels


def _pair(student: list[Level], teacher: list[Level]) -> Iterator[Row]:
    """A row for each pair, then one for each level without a partner."""
    pairs = pair_levels(student, teacher=teacher)
    for pair in pairs:
        channels = pair.student.channels, pair.teacher.channels
        yield (
            pair.name,
            pair.student.stride,
            *channels,
            automatic_adapter(*channels),
            f"{pair.student.tap}  <-  {pair.teacher.tap}",
        )
    paired = [level for pair in pairs for level in (pair.student, pair.teacher)]
    for side in (student, teacher):
        for level in (each for each in side if each not in paired):
            cells = (level.channels, "-") if side is student else ("-", level.channels)
            yield level.name, level.stride, *cells, "not distilled", level.tap


def _print(title: str, columns: Sequence[str], rows: Iterable[Row]) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("level", "tap", "adapter") else "right")
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)
