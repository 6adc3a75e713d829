"""Dataclasses as a checked schema for plain values: types, keys and nested sections, with errors that name the key."""

from __future__ import annotations

import copy
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from fgd_hooks.registry import suggestion


class ConfigError(ValueError):
    """A configuration with an unknown key, a wrong type or an impossible value."""


def require(holds: bool, key: str, found: object, expected: str) -> None:
    """Raise a ConfigError that names key, value and what is expected, unless ``holds``."""
    if not holds:
        raise ConfigError(f"{key} is {found!r}; expected {expected}.")


def one_of(key: str, found: str, known: Sequence[str]) -> None:
    """Raise a ConfigError with the nearest name, unless ``found`` is known."""
    if found not in known:
        raise ConfigError(f"{key} is {found!r}. {suggestion(str(found), known)}")


def positive(key: str, value: float) -> None:
    """Raise a ConfigError unless the value is finite and above 0."""
    require(math.isfinite(value) and value > 0, key, value, "a finite number above 0")


def not_negative(key: str, value: float) -> None:
    """Raise a ConfigError unless the value is finite and not below 0."""
    require(math.isfinite(value) and value >= 0, key, value, "a finite number, 0 or more")


class Section:
    """Base of a configuration's dataclasses: types are checked first, then values."""

    prefix = ""  # of the keys in messages; without annotation, so that it is no key itself

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            if not dataclasses.is_dataclass(kind):
                _check_type(getattr(self, name), kind, self.prefix + name)
            elif not isinstance(getattr(self, name), typing.cast(type, kind)):
                raise ConfigError(f"{self.prefix}{name} is a section; found {getattr(self, name)!r}.")
        self._check()

    def _check(self) -> None:
        """Raise ConfigError for an impossible value."""


def sections(values: list[Any], schema: type, key: str) -> list[Any]:
    """Entries of a list as sections: a text stands for a section with that name."""
    built = []
    for number, value in enumerate(values):
        place = f"{key}[{number}]"
        if isinstance(value, str):
            value = {"name": value}
        if isinstance(value, Mapping):
            check_keys(value, place, schema)
            try:
                value = build(schema, value)
            except ConfigError as error:
                raise ConfigError(f"{place}: {error}") from None
        if not isinstance(value, schema):
            raise ConfigError(f"{place} is {value!r}; expected a name or a section.")
        built.append(value)
    return built


def known_keys(schema: type, prefix: str = "") -> list[str]:
    """All keys in dotted form, ``balance.ratio`` and so on, sections included."""
    keys: list[str] = []
    for name, kind in typing.get_type_hints(schema).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            keys += known_keys(typing.cast(type, kind), f"{prefix}{name}.")
    return keys


def build(schema: type, values: Mapping[str, Any]) -> Any:
    """A dataclass from checked keys; absent ones take their defaults."""
    hints = typing.get_type_hints(schema)
    arguments = {
        key: build(hints[key], value) if dataclasses.is_dataclass(hints[key]) else copy.deepcopy(value)
        for key, value in values.items()
    }
    return schema(**arguments)


def check_keys(
    values: Mapping[str, Any], source: str, schema: type, prefix: str = "", root: type | None = None
) -> None:
    """Refuse keys that the schema does not have, and values where it has sections.

    Args:
        values: nested plain values.
        source: where they are from, for messages.
        schema: a dataclass.
        prefix: of the keys in messages.
        root: the outermost schema, whose keys are offered instead; None: ``schema``.

    Raises:
        ConfigError: names the key, the source and the nearest known key.
    """
    root = root or schema
    hints = typing.get_type_hints(schema)
    for key, value in values.items():
        if key not in hints:
            known = known_keys(root)
            raise ConfigError(f"{source}: there is no key {prefix}{key!s}. {suggestion(prefix + str(key), known)}")
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{source}: {prefix}{key} is a section; found {value!r}.")
            check_keys(value, source, typing.cast(type, kind), f"{prefix}{key}.", root)


def _check_type(value: Any, kind: Any, key: str) -> None:
    if not _fits(value, kind):
        expected = str(kind) if isinstance(kind, types.UnionType) else getattr(kind, "__name__", str(kind))
        raise ConfigError(f"{key} is {value!r}; expected {expected}.")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a plain value has the annotated type (no text for a number, no number for a text, no bool for either)."""
    if kind is Any:
        return True
    if isinstance(kind, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(kind))
    origin = typing.get_origin(kind) or kind
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is list:
        item = typing.get_args(kind)[0]
        return isinstance(value, (list, tuple)) and all(_fits(each, item) for each in value)
    if origin is types.NoneType:
        return value is None
    return isinstance(value, origin)
