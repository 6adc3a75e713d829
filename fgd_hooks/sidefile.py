"""The side file: what distillation adds to a training, beside the host's own checkpoint.

Written to a temporary file in the same folder, flushed to the disk and renamed, so that a reader finds either the old
file or the new one. Read with ``weights_only``, so that no code in it can run.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

FORMAT = 1


class SideFileError(ValueError):
    """A side file that is damaged or of another kind."""


def write_side_file(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors, numbers, texts and containers of them, atomically.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save({"fgd_hooks": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, RuntimeError):  # torch reports a failed write as one
            raise OSError(str(error)) from error
        raise


def read_side_file(path: Path) -> dict[str, Any]:
    """Read what :func:`write_side_file` wrote, onto the CPU.

    Raises:
        FileNotFoundError: there is none.
        SideFileError: it is damaged, holds code, or is no side file of this format.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises many kinds for damaged or unsafe files
        raise SideFileError(f"{path} cannot be read as a side file of fgd_hooks: {error}") from error
    if not isinstance(content, dict) or content.get("fgd_hooks") != FORMAT:
        raise SideFileError(f"{path} is no side file of fgd_hooks (format {FORMAT}).")
    return content


def _umask() -> int:
    """The process's file mode mask; temporary files are private, a side file is an ordinary one."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
