"""``key=value`` settings of a command line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fgd_hooks.errors import ConfigError
from fgd_hooks.utils.registry import suggestion


def split_settings(settings: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """``["imgsz=640", "fgd.interval=2"]`` as ``{"imgsz": 640}``, read as Ultralytics does, and ``["interval=2"]``."""
    from ultralytics.cfg import parse_key_value_pair

    values: dict[str, Any] = {}
    ours = [text.removeprefix("fgd.") for text in settings if text.startswith("fgd.")]
    for text in (text for text in settings if not text.startswith("fgd.")):
        if "=" not in text or text.startswith("="):
            raise ConfigError(f"{text!r} cannot be read; expected key=value.")
        key, value = parse_key_value_pair(text)
        if key in values:
            raise ConfigError(f"{key} is given twice.")
        if key == "teacher" and isinstance(value, str) and value.startswith("[") and value.endswith("]"):
            value = [file.strip(" '\"") for file in value[1:-1].split(",")]
        values[key] = value
    return values, ours


def check_settings(settings: dict[str, Any], required: dict[str, str], known: Iterable[str] | None = None) -> None:
    """Refuse settings without a required key (to its meaning), or with one that is not ``known`` (None: all are)."""
    for key in settings:
        if known is not None and key not in known:
            raise ConfigError(f"There is no setting {key!r}. {suggestion(key, known)}")
    for key, meaning in required.items():
        if not settings.get(key):
            raise ConfigError(f"{key}= is missing ({meaning}); --help lists the settings.")
