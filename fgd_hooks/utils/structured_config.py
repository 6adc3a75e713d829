"""Settings from YAML files, dicts and ``key=value`` texts: OmegaConf's structured configs over plain dataclasses.

A schema is a dataclass whose fields have defaults (``omegaconf.MISSING`` where a value must be given). Its sections are
dataclasses, too, also optional ones and those of lists and dicts. Values that are impossible are refused by
``__post_init__``, with a ConfigError (fgd_hooks/config.py has a base class for that)::

    @dataclass
    class Study:
        epochs: int = 45
        student: Student = field(default_factory=Student)
        data: dict[str, Data] = field(default_factory=dict)

    study = load(Study, "study.yaml", ["student.scale=[0.5, 0.25, 512]"])
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from fgd_hooks.errors import ConfigError
from fgd_hooks.utils.registry import suggestion

MAX_TEXT, MAX_DEPTH, MAX_VALUES = 64 * 1024, 20, 10_000  # a configuration has one or two thousand characters

Schema = TypeVar("Schema")


def known_keys(schema: type, prefix: str = "") -> list[str]:
    """All keys in dotted form, ``balance.ratio`` and so on, sections included."""
    keys: list[str] = []
    hints = typing.get_type_hints(schema)
    for name in (field.name for field in dataclasses.fields(schema)):  # type: ignore[arg-type]
        keys.append(prefix + name)
        if dataclasses.is_dataclass(kind := hints[name]):
            keys += known_keys(typing.cast(type, kind), f"{prefix}{name}.")
    return keys


def load(
    schema: type[Schema],
    source: Any = None,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    name: str = "configuration",
) -> Schema:
    """A checked instance of a schema."""
    if isinstance(source, (str, Path)):
        name, source = str(source), read_yaml(source)
    if not isinstance(source, (schema, Mapping, type(None))):
        raise ConfigError(f"{name} is {source!r:.200}; expected keys and values.")
    overrides = overrides if isinstance(overrides, Mapping) else _parsed(overrides)
    given: dict[str, Any] = {name: source or {}, "overrides": overrides}
    config, place, key = OmegaConf.structured(schema, flags={"allow_objects": True}), name, ""
    try:
        for place, values in given.items():  # noqa: B007  (for the messages below, as is the key)
            _check_extent(values)
            for key, value in (values if isinstance(values, Mapping) else dataclasses.asdict(values)).items():
                for part in reversed(key.split(".")):
                    value = {part: value}
                _check_extent(value)  # dots are sections, too
                config.merge_with(value)
        place = ", ".join(place for place, values in given.items() if values) or name
        return typing.cast(Schema, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{place}: {_reason(error, schema, key)}") from error
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Keys and values of a YAML file: plain ones, without aliases and tags."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"The configuration file {str(path)!r} does not exist.")
    try:
        with open(path, encoding="utf-8") as file:
            values = _parse(file.read(MAX_TEXT + 1))
    except ValueError as error:  # also of a text that is not UTF-8
        raise ConfigError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(values, (dict, type(None))):
        raise ConfigError(f"{path} holds a {type(values).__name__}; expected keys and values.")
    return values or {}


def _parse(text: str) -> Any:
    """Plain values from YAML as OmegaConf reads it: 1e-3 is a number, a key that is given twice is an error."""
    import yaml

    try:
        if len(text) > MAX_TEXT:
            raise ValueError(f"it is longer than {MAX_TEXT} characters")
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
            # aliases of aliases could fill the memory, and a tag could name a class
            if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
                raise ValueError("aliases (*name) and tags (!name) are not read; write the value itself")
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"_={text}"]))["_"]  # type: ignore[index,call-overload]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _parsed(overrides: Iterable[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = str(text).partition("=")
        if not (key and equals):
            raise ConfigError(f"The override {text!r} cannot be read; expected key=value.")
        if key in found:
            raise ConfigError(f"overrides: {key} is given twice.")
        try:
            found[key] = None if value.lower() == "none" else _parse(value)
        except ValueError as error:
            raise ConfigError(f"The override {text!r} cannot be read: {error}") from error
    return found


def _check_extent(values: Any) -> None:
    """Refuse what no configuration holds: endless nesting, thousands of values, huge numbers, references."""
    waiting, count = [(values, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_VALUES:
            raise ConfigError(f"nested more than {MAX_DEPTH} deep, or more than {MAX_VALUES} values.")
        if isinstance(value, int) and value.bit_length() > 63:
            raise ConfigError(f"a whole number of {value.bit_length()} bits; at most 63 are possible.")
        if isinstance(value, str) and "${" in value:
            raise ConfigError(f"{value!r} is a reference, which is not followed; write the value itself.")
        value = vars(value) if dataclasses.is_dataclass(value) else value
        if isinstance(value, Mapping):
            if wrong := [type(key).__name__ for key in value if not isinstance(key, str)]:
                raise ConfigError(f"a key is a {wrong[0]}; expected a text. Put it into quotes.")
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            waiting += [(each, depth + 1) for each in value]


def _reason(error: OmegaConfBaseException, schema: type, key: str) -> str:
    """What OmegaConf refuses at a key, in one line."""
    key = str(error.full_key or key)
    before, dot, last = key.rpartition(".")
    section: Any = error.object_type if dataclasses.is_dataclass(error.object_type) else None
    if section and isinstance(error, (ConfigKeyError, ConfigAttributeError)):
        if now := dict(getattr(section, "renamed", ())).get(last):
            return f"{key} is called {before}{dot}{now} now."
        known = [*known_keys(section, before + dot), *known_keys(schema)]
        return f"there is no key {key}. {suggestion(key, dict.fromkeys(known))}"
    kind = typing.get_type_hints(section).get(last) if section else None
    if kind is None or error.value is None:
        return f"{key}: {str(error).partition(chr(10))[0]}."
    return f"{key} is {error.value!r:.200}; expected {kind.__name__ if isinstance(kind, type) else kind}."
