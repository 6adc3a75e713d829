"""Distillation losses between one student and one teacher feature map, each registered by name."""

from fgd_hooks.losses.attention import channel_attention, spatial_attention
from fgd_hooks.losses.base import LOSSES, FeatureLoss, LossResult, Targets, create_loss, list_losses, register_loss
from fgd_hooks.losses.cwd import CWDLoss
from fgd_hooks.losses.fgd import PRESETS, FGDLoss
from fgd_hooks.losses.gc_block import GcBlock
from fgd_hooks.losses.imitation import ImitationLoss
from fgd_hooks.losses.mgd import MGDLoss
from fgd_hooks.losses.pkd import PKDLoss
from fgd_hooks.losses.scored import ScoredLoss

__all__ = [
    "LOSSES",
    "PRESETS",
    "CWDLoss",
    "FGDLoss",
    "FeatureLoss",
    "GcBlock",
    "ImitationLoss",
    "LossResult",
    "MGDLoss",
    "PKDLoss",
    "ScoredLoss",
    "Targets",
    "channel_attention",
    "create_loss",
    "list_losses",
    "register_loss",
    "spatial_attention",
]
