"""Whether several processes train together, and whether one of them failed."""

from __future__ import annotations

import torch


def is_distributed() -> bool:
    """Whether a process group of torch.distributed is at work."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def on_any_process(flag: bool, device: torch.device) -> bool:
    """Whether a flag is set on any process; all must call this together. Alone: the flag itself."""
    if not is_distributed():
        return flag
    flags = torch.tensor([float(flag)], device=device)
    torch.distributed.all_reduce(flags)
    return bool(flags.item() > 0)
