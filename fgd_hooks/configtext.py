"""Plain values from YAML and from ``key=value`` texts, read as untrusted input: bounded in size and depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fgd_hooks.schema import ConfigError

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
