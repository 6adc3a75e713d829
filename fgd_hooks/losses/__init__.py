"""Distillation losses between one student and one teacher feature map, each registered by name."""

from fgd_hooks.losses.attention import channel_attention, spatial_attention
from fgd_hooks.losses.base import LOSSES, FeatureLoss, LossResult, create_loss, list_losses, register_loss
from fgd_hooks.losses.channelwise import ChannelWiseLoss
from fgd_hooks.losses.context import GcBlock
from fgd_hooks.losses.fgd import PRESETS, FGDLoss
from fgd_hooks.losses.generation import GenerationLoss
from fgd_hooks.losses.imitation import ImitationLoss
from fgd_hooks.losses.pearson import PearsonLoss
from fgd_hooks.losses.scored import ScoredLoss

__all__ = [
    "LOSSES",
    "PRESETS",
    "ChannelWiseLoss",
    "FGDLoss",
    "FeatureLoss",
    "GcBlock",
    "GenerationLoss",
    "ImitationLoss",
    "LossResult",
    "PearsonLoss",
    "ScoredLoss",
    "channel_attention",
    "create_loss",
    "list_losses",
    "register_loss",
    "spatial_attention",
]
