"""Whether several processes train together."""

from __future__ import annotations

import torch


def is_distributed() -> bool:
    """Whether a process group of torch.distributed is at work."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
