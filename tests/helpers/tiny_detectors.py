"""Tiny torchvision detectors of every family, and batches of white rectangles for them."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from tests.helpers.tiny import block

CLASSES = 3
FPN = 32  # channels; the head of FCOS wants a multiple of 32


def pyramid(widths: tuple[int, ...], first: int, last: nn.Module | None) -> BackboneWithFPN:
    """Levels from ``first`` (2 or 3) to 5, and what ``last`` adds; by default every second cell of P5 as ``pool``."""
    stages = [block(3, widths[0], 4)] + [block(a, b, 2) for a, b in zip(widths[:-1], widths[1:], strict=True)]
    body = nn.Sequential(OrderedDict((f"stage{number}", stage) for number, stage in enumerate(stages, start=2)))
    used = range(first, 6)
    return BackboneWithFPN(
        body, {f"stage{level}": str(level - first) for level in used}, [widths[level - 2] for level in used], FPN, last
    )


def retinanet(widths=(8, 8, 12, 16), **settings) -> nn.Module:
    return detection.RetinaNet(pyramid(widths, 3, LastLevelP6P7(FPN, FPN)), CLASSES, **sized(settings))


def fcos(widths=(8, 8, 12, 16), **settings) -> nn.Module:
    return detection.FCOS(pyramid(widths, 3, LastLevelP6P7(FPN, FPN)), CLASSES, **sized(settings))


def faster_rcnn(widths=(8, 8, 12, 16), kind=detection.FasterRCNN, **settings) -> nn.Module:
    settings = {
        "rpn_anchor_generator": AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((1.0,),) * 5),
        "box_head": TwoMLPHead(FPN * 49, 32),
        "box_predictor": FastRCNNPredictor(32, CLASSES),
        "rpn_post_nms_top_n_train": 50,
        "box_batch_size_per_image": 16,
        **settings,
    }
    return kind(pyramid(widths, 2, None), None, **sized(settings))


def mask_rcnn(widths=(8, 8, 12, 16), **settings) -> nn.Module:
    heads = {"mask_head": MaskRCNNHeads(FPN, (16,), 1), "mask_predictor": MaskRCNNPredictor(16, 16, CLASSES)}
    return faster_rcnn(widths, detection.MaskRCNN, **heads, **settings)


class SSDBody(nn.Module):
    """Strides 8, 16, 32, and a last map by a convolution without padding, as in SSD300."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.out_channels = [*widths, widths[-1]]
        self.stem = block(3, widths[0], 8)
        self.stages = nn.ModuleList(block(a, b, 2) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.last = nn.Conv2d(widths[-1], widths[-1], 3)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = [self.stem(images)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        maps.append(self.last(maps[-1]))
        return OrderedDict((str(number), each) for number, each in enumerate(maps))


def ssd(widths=(8, 12, 16), size=(96, 96), **settings) -> nn.Module:
    return detection.ssd.SSD(SSDBody(widths), DefaultBoxGenerator([[2]] * 4), size, CLASSES, **settings)


def sized(settings: dict) -> dict:
    return {"min_size": 64, "max_size": 128, **settings}


FAMILIES = {"retinanet": retinanet, "fcos": fcos, "faster_rcnn": faster_rcnn, "mask_rcnn": mask_rcnn, "ssd": ssd}


def build(family: str, widths: tuple[int, ...] | None = None, seed: int = 0, **settings) -> nn.Module:
    """A detector of a family; its batch normalisations have statistics, so that features in eval mode are natural."""
    torch.manual_seed(seed)
    model = FAMILIES[family](*(() if widths is None else (widths,)), **settings)
    with torch.no_grad():
        for _ in range(3):
            model.backbone(torch.randn(2, 3, 128, 128))
    return model


def rectangles() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two black images of different sizes, a white rectangle with its box (and mask) in each."""
    images, targets = [], []
    for (height, width), box in (((80, 80), (8, 40, 40, 72)), ((60, 100), (56, 8, 96, 40))):
        x1, y1, x2, y2 = box
        image = torch.zeros(3, height, width)
        image[:, y1:y2, x1:x2] = 1
        images.append(image)
        boxes = torch.tensor([box], dtype=torch.float32)
        targets.append({"boxes": boxes, "labels": torch.ones(1, dtype=torch.long), "masks": image[:1].byte()})
    return images, targets
