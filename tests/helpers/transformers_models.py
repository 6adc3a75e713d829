"""Small detectors of transformers with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn


def resnet(kind: str, stages: Sequence[int], width: int = 8) -> Any:
    """Configuration of a ResNet with one block in each of four stages, of these widths: width times 1, 2, 3, 4."""
    widths = [width * number for number in (1, 2, 3, 4)]
    settings = {"embedding_size": width, "hidden_sizes": widths, "depths": [1] * 4, "layer_type": "basic"}
    return getattr(transformers, f"{kind}Config")(**settings, out_features=[f"stage{number}" for number in stages])


def detr(kind: str = "Detr", stages: Sequence[int] = (4,), width: int = 8, **settings: Any) -> nn.Module:
    """A detector of DETR's family, with the configuration's names of its settings."""
    torch.manual_seed(width)
    body = resnet("ResNet", stages, width)
    config = getattr(transformers, f"{kind}Config")(backbone_config=body, encoder_layers=1, **settings)
    model: nn.Module = getattr(transformers, f"{kind}ForObjectDetection")(config)
    return model


def rt_detr(kind: str = "RTDetr", width: int = 8, hidden: int = 16, **settings: Any) -> nn.Module:
    """A detector of RT-DETR's family with levels of strides 8, 16 and 32."""
    torch.manual_seed(width)
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=resnet("RTDetrResNet", (2, 3, 4), width),
        encoder_in_channels=[2 * width, 3 * width, 4 * width],
        decoder_in_channels=[hidden] * 3,
        encoder_hidden_dim=hidden,
        d_model=hidden,
        **{"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 10, "decoder_layers": 1, **settings},
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    )
    model: nn.Module = getattr(transformers, f"{kind}ForObjectDetection")(config)
    return model
