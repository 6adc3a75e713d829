"""Files that are written in one piece: a reader sees the old or the new content, never half of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(file: Path, content: bytes) -> None:
    """Write a file with the permissions that the process's umask leaves; nothing half-written stays behind."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())  # the new name must not survive a loss of power without its content
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(file: Path) -> None:
    """Remove the temporary files of writes to ``file`` that were killed; for the one process that writes it."""
    if file.parent.is_dir():
        for leftover in [each for each in file.parent.iterdir() if each.name.startswith(f".{file.name}.")]:
            leftover.unlink(missing_ok=True)


def write_json(file: Path, content: object) -> None:
    """Write a JSON file in one piece."""
    write_whole(file, f"{json.dumps(content, indent=1)}\n".encode())


def read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object."""
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
