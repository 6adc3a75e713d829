"""``key=value`` settings of a command line: read, checked against what takes them; and the list of all ``fgd.*``."""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fgd_hooks.config import FGDConfig
from fgd_hooks.errors import ConfigError
from fgd_hooks.utils.registry import suggestion
from fgd_hooks.utils.structured_config import known_keys

LISTS = {each.name for each in dataclasses.fields(FGDConfig) if "list[" in str(each.type)}
AT_LEAST_1 = ("epochs", "imgsz")


def split_settings(settings: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """``["imgsz=640", "fgd.weight=2"]`` as ``{"imgsz": 640}``, read as Ultralytics does, and ``["weight=2"]``.

    Lists go without brackets, too: ``teacher=a.pt,b.pt``, ``fgd.levels=P3,P4``.
    """
    from ultralytics.cfg import parse_key_value_pair

    values: dict[str, Any] = {}
    ours: list[str] = []
    for text in settings:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise ConfigError(f"{text!r} cannot be read; expected key=value.")
        if not value.strip():
            raise ConfigError(f"{key}= has no value.")
        if key.startswith("fgd."):
            key = key.removeprefix("fgd.")
            if key in LISTS and not value.startswith("[") and value.lower() not in ("none", "null"):
                value = json.dumps(split_list(value))
            ours.append(f"{key}={value}")
            continue
        key, found = parse_key_value_pair(text)
        if key in values:
            raise ConfigError(f"{key} is given twice.")
        if key in ("teacher", "images") and isinstance(found, str) and not Path(found).exists() and "," in found:
            found = split_list(found)
        values[key] = found
    return values, ours


def split_list(text: str) -> list[str]:
    """``a,b`` or ``[a, b]`` as a list."""
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    return [each.strip(" '\"") for each in inner.split(",")]


def check_settings(settings: dict[str, Any], required: dict[str, str], known: Iterable[str]) -> None:
    """Refuse settings without a required key (to its meaning), or with one that is not ``known``."""
    ours, known = known_keys(FGDConfig), list(known)
    for key in settings:
        if key not in known:
            near = f"Did you mean 'fgd.{key}'?" if key in ours and "fgd.*" in known else suggestion(key, known)
            raise ConfigError(f"There is no setting {key!r}. {near}")
    for key, meaning in required.items():
        if settings.get(key) is None:
            raise ConfigError(f"{key}= is missing ({meaning}); --help lists the settings.")


def host_keys() -> list[str]:
    """All settings of Ultralytics' ``model.train()``."""
    from ultralytics.utils import DEFAULT_CFG_DICT

    return [*DEFAULT_CFG_DICT, "augmentations", "save_dir"]


def check_host(settings: dict[str, Any]) -> None:
    """Refuse values of Ultralytics' own settings that it would refuse later, after minutes or by a traceback."""
    import torch
    from ultralytics.cfg import check_cfg

    given = {key: value for key, value in settings.items() if key in host_keys()}
    try:
        check_cfg(dict(given))
    except (TypeError, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    for key in (key for key in AT_LEAST_1 if key in given):
        sizes = given[key] if isinstance(given[key], (list, tuple)) else [given[key]]
        if not all(type(size) is int and size >= 1 for size in sizes):
            raise ConfigError(f"{key} is {given[key]!r}; expected a whole number, 1 or more.")
    batch = given.get("batch", 1)
    if isinstance(batch, bool) or not isinstance(batch, (int, float)) or (batch <= 0 and batch != -1):
        raise ConfigError(f"batch is {batch!r}; expected a number of images, a share of the GPU's memory, or -1.")
    device, count = str(given.get("device", "")).lower().replace("cuda:", "").strip("[]()"), torch.cuda.device_count()
    if not re.fullmatch(r"|none|cpu|cuda|mps(:\d)?|[nx]pu(:\d)?|-?\d+(, *-?\d+)*,?", device):
        raise ConfigError(f"device={given['device']} is no device; expected cpu, mps, or GPUs such as 0 or 0,1.")
    numbers = [int(each) for each in re.findall(r"\d+", device) if device[0] in "-0123456789"]
    if (device == "cuda" and not count) or (numbers and max(numbers) >= count):
        raise ConfigError(
            f"device={given['device']} is not there: torch sees {count} GPU(s). Give device=cpu, or none."
        )


def check_types(settings: dict[str, Any], function: Callable[..., Any]) -> None:
    """Refuse values of another type than the function's arguments have."""
    hints = typing.get_type_hints(function)
    for key, value in settings.items():
        options = list(_options(hints[key]))
        if not any(_is(value, option) for option in options):
            names = [str(getattr(option, "__name__", option)) for option in options if option is not type(None)]
            expected = " or ".join(dict.fromkeys(name for name in names if name != "EvalData"))
            raise ConfigError(f"{key} is {value!r}; expected {expected}.")


def _options(hint: Any) -> Iterator[Any]:
    """The types of a union; the values of a Literal."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType, typing.Literal):
        for each in typing.get_args(hint):
            yield from _options(each)
    else:
        yield hint


def _is(value: Any, option: Any) -> bool:
    """Whether a value is of a type, or is the value that a Literal names."""
    kind = typing.get_origin(option) or option
    if not isinstance(kind, type):
        return kind is Any or value == option
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    wider: dict[type, tuple[type, ...]] = {float: (int, float), Path: (str,), collections.abc.Sequence: (list, tuple)}
    return isinstance(value, wider.get(kind, (kind,)))


def settings_command(arguments: argparse.Namespace) -> None:
    """``fgd settings``: all ``fgd.*`` keys with default and meaning, as lines or as a JSON schema for editors."""
    schema = _schema(FGDConfig)
    if arguments.json:
        print(
            json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "fgd", **schema}, indent=1)
        )
        return
    for key, entry in _flat(schema):
        default = json.dumps(entry.get("default"))
        print(f"fgd.{key}={default}\n    {entry['description']}")


def _flat(schema: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for key, entry in schema["properties"].items():
        if "properties" in entry:
            yield from _flat(entry, f"{prefix}{key}.")
        else:
            yield prefix + key, entry


def _schema(section: type) -> dict[str, Any]:
    """A dataclass as a JSON schema: types and defaults of its fields, their meanings from its docstring."""
    text = inspect.getdoc(section) or ""
    found = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", text.partition("Args:")[2], re.M)
    meanings = {name: " ".join(meaning.split()) for name, meaning in found}
    hints, default = typing.get_type_hints(section), section()
    properties: dict[str, Any] = {}
    for each in dataclasses.fields(section):  # type: ignore[arg-type]
        if dataclasses.is_dataclass(hints[each.name]):
            properties[each.name] = _schema(typing.cast(type, hints[each.name]))
        else:
            value = getattr(default, each.name)
            names = {int: "integer", float: "number", str: "string", bool: "boolean", list: "array", dict: "object"}
            kinds = [names.get(typing.get_origin(option) or option, "null") for option in _options(hints[each.name])]
            kind = {} if Any in _options(hints[each.name]) else {"type": kinds[0] if len(kinds) == 1 else kinds}
            properties[each.name] = {**kind, "default": value, "description": meanings.get(each.name, "")}
    return {
        "type": "object",
        "description": text.partition("\n")[0],
        "additionalProperties": False,
        "properties": properties,
    }
