"""Focal and Global Distillation (FGD) for object detectors, as hooks: neither model nor training code changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fgd_hooks.adapters import create_adapter, list_adapters, register_adapter
from fgd_hooks.config import ConfigError, FGDConfig, load_config, save_config
from fgd_hooks.distiller import Distilled, Distiller, PerTeacher
from fgd_hooks.findings import Finding, Report
from fgd_hooks.losses import (
    FGDLoss,
    ImitationLoss,
    LossResult,
    create_loss,
    list_losses,
    register_loss,
)
from fgd_hooks.pyramid import Level, LevelPair, PairingError, find_levels, pair_levels
from fgd_hooks.reconstruction import Reconstruction, fit_channels
from fgd_hooks.selection import inherit_channels
from fgd_hooks.tapnames import Tap, TapError
from fgd_hooks.taps import FeatureTaps
from fgd_hooks.teacher import TeacherError
from fgd_hooks.transfer import Inheritance, inherit

if TYPE_CHECKING:
    from fgd_hooks.integrations.ultralytics import FGDCallback

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "Distilled",
    "Distiller",
    "FGDCallback",
    "FGDConfig",
    "FGDLoss",
    "FeatureTaps",
    "Finding",
    "ImitationLoss",
    "Inheritance",
    "Level",
    "LevelPair",
    "LossResult",
    "PairingError",
    "PerTeacher",
    "Reconstruction",
    "Report",
    "Tap",
    "TapError",
    "TeacherError",
    "create_adapter",
    "create_loss",
    "find_levels",
    "fit_channels",
    "inherit",
    "inherit_channels",
    "list_adapters",
    "list_losses",
    "load_config",
    "pair_levels",
    "register_adapter",
    "register_loss",
    "save_config",
]


def __getattr__(name: str) -> Any:
    """Import the callback on first use, so that ``import fgd_hooks`` needs torch alone."""
    if name == "FGDCallback":
        from fgd_hooks.integrations.ultralytics import FGDCallback

        return FGDCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
