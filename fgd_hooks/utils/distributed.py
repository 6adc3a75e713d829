"""Which processes train together, and what they agree on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WORLD = "world"
"""Stands for the default process group, where there is one."""

ProcessGroup = Any
"""A ``torch.distributed.ProcessGroup``, :data:`WORLD`, or None: this process is alone, whoever else there is."""


def is_distributed(group: ProcessGroup = WORLD) -> bool:
    """Whether processes train together: whether a process group of torch.distributed is at work, unless told which."""
    if isinstance(group, str):
        return torch.distributed.is_available() and torch.distributed.is_initialized()
    return group is not None


def all_reduce(tensor: Tensor, group: ProcessGroup = WORLD) -> None:
    """Sum a tensor over the processes, in place; all must call this together. Alone: nothing."""
    if is_distributed(group):
        torch.distributed.all_reduce(tensor, group=None if isinstance(group, str) else group)


def broadcast(tensor: Tensor, group: ProcessGroup = WORLD) -> None:
    """Take the first process's tensor, in place; all must call this together. Alone: nothing."""
    if is_distributed(group):
        group = torch.distributed.group.WORLD if isinstance(group, str) else group
        torch.distributed.broadcast(tensor, torch.distributed.get_global_rank(group, 0), group=group)


def on_any_process(flag: bool, device: torch.device, group: ProcessGroup = WORLD) -> bool:
    """Whether a flag is set on any process; all must call this together. Alone: the flag itself."""
    if not is_distributed(group):
        return flag
    flags = torch.tensor([float(flag)], device=device)
    all_reduce(flags, group)
    return bool(flags.item() > 0)
