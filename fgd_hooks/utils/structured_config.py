"""Dataclasses as a checked schema for plain values: types, keys and nested sections, with errors that name the key."""

from __future__ import annotations

import copy
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fgd_hooks.errors import ConfigError
from fgd_hooks.utils.registry import suggestion


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


MAX_TEXT = 64 * 1024  # characters of YAML; a configuration takes one or two thousand


MAX_ALIASES = 20  # each may repeat all that came before it


MAX_DEPTH = 20


MAX_VALUES = 10_000


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a zero character: no file has such a name
        return False


def read_yaml(path: Path) -> dict[str, Any]:
    """Keys and values of a YAML file.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: it is too long, no valid YAML, or holds something else than keys and values.
    """
    if not _is_file(path):
        raise FileNotFoundError(f"The configuration file {str(path)!r} does not exist.")
    if path.stat().st_size > 4 * MAX_TEXT:
        raise ConfigError(f"{path} has {path.stat().st_size} bytes; that is no configuration.")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of a text that is not UTF-8
        raise ConfigError(f"{path} is no valid YAML: {error}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; expected keys and values.")
    return values


def parse_yaml(text: str) -> Any:
    """Plain values from YAML as OmegaConf reads it: 1e-3 is a number, a key that is given twice is an error.

    Raises:
        ValueError: the text is no valid YAML, or unreasonably long or deep.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if len(text) > MAX_TEXT:
        raise ValueError(f"it has {len(text)} characters; at most {MAX_TEXT} are read")
    try:
        aliases = depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            aliases += isinstance(event, yaml.AliasEvent)
            # an alias that repeats aliases multiplies: a short text could fill the memory
            if depth > MAX_DEPTH or aliases > MAX_ALIASES:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep, or has more than {MAX_ALIASES} aliases")
        # a list with the text as its one element, so that plain values are read as well
        indented = "".join(f"  {line}\n" for line in text.splitlines()) or "  null\n"
        return OmegaConf.to_container(OmegaConf.create(f"-\n{indented}"), resolve=False)[0]  # type: ignore[index]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def nested(settings: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """``["balance.ratio=1"]`` or ``{"balance.ratio": 1}`` as ``{"balance": {"ratio": 1}}``.

    Raises:
        ConfigError: a text that is no ``key=value``, or a key given twice.
    """
    pairs = list(settings.items()) if isinstance(settings, Mapping) else [_key_value(text) for text in settings]
    found: dict[str, Any] = {}
    for key, value in pairs:
        *sections, last = str(key).split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{key} and another setting give the same key twice.")
        if last in place and not isinstance(settings, Mapping):
            raise ConfigError(f"overrides: {key} is given twice.")
        if isinstance(value, Mapping) and isinstance(place.get(last), dict):
            place[last].update(value)
        else:
            place[last] = dict(value) if isinstance(value, Mapping) else value
    return found


def _key_value(text: str) -> tuple[str, Any]:
    if not isinstance(text, str):
        raise ConfigError(f"An override is a {type(text).__name__}; expected a text key=value.")
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"The override {text!r} cannot be read; expected key=value.")
    try:
        return key, None if value.lower() == "none" else parse_yaml(value)
    except ValueError as error:
        raise ConfigError(f"The override {text!r} cannot be read: {error}") from error


def check_extent(values: Any, source: str, left: list[int] | None = None, depth: int = 0) -> None:
    """Refuse what no configuration holds: endless nesting, thousands of values, keys that are no text, huge numbers.

    Args:
        values: anything.
        source: where it is from, for the message.
        left: one number: how many more values there may be.
        depth: how many containers ``values`` is in.
    """
    left = [MAX_VALUES] if left is None else left
    left[0] -= 1
    if depth > MAX_DEPTH or left[0] < 0:
        raise ConfigError(f"{source}: nested more than {MAX_DEPTH} deep, or more than {MAX_VALUES} values.")
    if isinstance(values, int) and not -(2**63) <= values < 2**63:
        raise ConfigError(f"{source}: a whole number of {values.bit_length()} bits; at most 64 are possible.")
    if dataclasses.is_dataclass(values):
        values = vars(values)
    if isinstance(values, Mapping):
        for key in values:
            if not isinstance(key, str):
                raise ConfigError(f"{source}: a key is a {type(key).__name__}; expected a text. Put it into quotes.")
        values = list(values.values())
    if isinstance(values, (list, tuple)):
        for value in values:
            check_extent(value, source, left, depth + 1)


def merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Put nested values into others, in place; where both have a value, the later one stays."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            section = into.setdefault(key, {})
            if isinstance(section, dict):
                merge(section, value)
                continue
        into[key] = value
