"""``fgd levels``: a model's feature levels, and how a teacher's pair with them, as a table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence

from rich.console import Console

from fgd_hooks.adapters import automatic_adapter
from fgd_hooks.errors import ConfigError
from fgd_hooks.evaluation.reporting import Table
from fgd_hooks.integrations.load_model import load_model
from fgd_hooks.pairing import pair_levels
from fgd_hooks.taps.levels import Level, find_levels

Row = Sequence[object]


def levels_command(arguments: argparse.Namespace) -> None:
    """``fgd levels``: probe one model, or two and pair them, and print a table."""
    student, teacher = arguments.model, arguments.teacher
    shape = _shape(arguments.example)
    levels = _probe(student, arguments.imgsz, shape)
    if teacher:
        columns: tuple[str, ...] = ("level", "stride", "student", "teacher", "adapter", "tap")
        title = f"{student}  <-  {teacher}"
        rows: list[Row] = list(_pair(levels, _probe(teacher, arguments.imgsz, shape)))
    else:
        columns = ("level", "stride", "channels", "map", "tap")
        title = student
        rows = [(each.name, each.stride, each.channels, "{}x{}".format(*each.size), each.tap) for each in levels]
    if arguments.json:
        found = [dict(zip(columns, (_plain(cell) for cell in row), strict=True)) for row in rows]
        print(json.dumps({"model": student, **({"teacher": teacher} if teacher else {}), "levels": found}, indent=1))
    else:
        cells = [tuple(map(str, row)) for row in rows]
        Console().print(Table(columns, cells, title).rich(title_justify="left"))


def _plain(cell: object) -> object:
    return cell if isinstance(cell, int) else str(cell)


def _shape(text: str | None) -> tuple[int, ...] | None:
    """The shape of the probe's images from a text such as ``1,3,512,640``.

    Raises:
        ConfigError: it is no such text.
    """
    if text is None:
        return None
    numbers = text.split(",")
    if len(numbers) != 4 or not all(number.strip().isdigit() and int(number) > 0 for number in numbers):
        raise ConfigError(f"--example {text!r} cannot be read; expected a shape such as 1,3,512,640.")
    return tuple(map(int, numbers))


def _probe(name: str, size: int, shape: tuple[int, ...] | None) -> list[Level]:
    model = load_model(name, shape[2] if shape else size)
    example = model.example if shape is None else model.example.new_zeros(shape)
    levels = find_levels(model.module, model.taps, example=example, role=name)
    largest = max(level.stride for level in levels)
    whole = levels[0].size[0] * levels[0].stride == size and not size % largest
    if not (model.fixed or whole or shape):
        fitting = -(-size // largest) * largest
        raise ConfigError(f"--imgsz {size} is no multiple of {largest}, the largest stride of {name}; try {fitting}.")
    return levels


def _pair(student: list[Level], teacher: list[Level]) -> Iterator[Row]:
    """A row for each pair and for each level without a partner, by stride."""
    yield from sorted(_rows(student, teacher), key=lambda row: int(str(row[1])))


def _rows(student: list[Level], teacher: list[Level]) -> Iterator[Row]:
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
