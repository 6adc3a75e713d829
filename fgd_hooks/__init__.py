"""Focal and Global Distillation (FGD) for object detectors, as hooks: neither model nor training code changes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fgd_hooks.adapters import list_adapters, register_adapter
    from fgd_hooks.config import FGDConfig, load_config
    from fgd_hooks.diagnostics.doctor import diagnose
    from fgd_hooks.distiller import Distiller
    from fgd_hooks.errors import FGDError
    from fgd_hooks.initialization.inherit import inherit
    from fgd_hooks.initialization.initialize import initialize
    from fgd_hooks.initialization.reconstruction import fit_channels
    from fgd_hooks.initialization.weight_selection import inherit_channels
    from fgd_hooks.integrations.ultralytics.callback import FGDCallback
    from fgd_hooks.losses.base import list_losses, register_loss
    from fgd_hooks.pairing import pair_levels
    from fgd_hooks.taps.levels import find_levels

__version__ = "0.1.0"

_HOME = {  # imported on first use: the command line answers without torch, and the core works without Ultralytics
    "Distiller": "distiller",
    "FGDCallback": "integrations.ultralytics.callback",
    "FGDConfig": "config",
    "FGDError": "errors",
    "diagnose": "diagnostics.doctor",
    "find_levels": "taps.levels",
    "fit_channels": "initialization.reconstruction",
    "inherit": "initialization.inherit",
    "initialize": "initialization.initialize",
    "inherit_channels": "initialization.weight_selection",
    "list_adapters": "adapters",
    "list_losses": "losses",
    "load_config": "config",
    "pair_levels": "pairing",
    "register_adapter": "adapters",
    "register_loss": "losses",
}

__all__ = [
    "Distiller",
    "FGDCallback",
    "FGDConfig",
    "FGDError",
    "__version__",
    "diagnose",
    "find_levels",
    "fit_channels",
    "inherit",
    "inherit_channels",
    "initialize",
    "list_adapters",
    "list_losses",
    "load_config",
    "pair_levels",
    "register_adapter",
    "register_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
