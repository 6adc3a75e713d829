"""The processes of a training: one, or those that torchrun starts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from detector_settings import Settings


def start_processes(settings: Settings) -> tuple[int, int, torch.device]:
    """Join the process group, if torchrun made one; returns this process's rank, their number and its device."""
    rank, local, world = (
        int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    kind = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if kind == "cuda":
        torch.cuda.set_device(local)
    if world > 1:
        torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    return rank, world, torch.device(kind, local) if kind == "cuda" else torch.device(kind)


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Leave the process group, if there is one, at the end of the block."""
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
