"""Untrained detectors with real batch statistics, and batches for them: what the benchmarks of a step run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NARROW = {"yolo26-half": ("yolo26n.yaml", [0.5, 0.125, 1024])}
"""Students of the studies that Ultralytics has no yaml of: which yaml they come from; depth, width, most channels."""


def yolo(name: str, classes: int = 20, args: dict[str, Any] | None = None) -> nn.Module:
    """An Ultralytics detector, ready to train on batches of :func:`yolo_batch`."""
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    from fgd_hooks.study.worker import rescaled

    yaml = rescaled(*NARROW[name]) if name in NARROW else f"{name}.yaml"
    model: nn.Module = DetectionModel(yaml, nc=classes, verbose=False)
    model.args = get_cfg(overrides=args or {})
    model.train()
    with torch.no_grad():  # the batch statistics of an untrained model make its features vanish in eval mode
        for seed in range(3):
            model(yolo_batch(64, 4, seed)["img"])
    return model


def yolo_batch(size: int, count: int, seed: int = 0, boxes: int = 10) -> dict[str, Tensor]:
    """A training batch as Ultralytics' loader gives it."""
    generator = torch.Generator().manual_seed(seed)
    extent = 0.05 + 0.45 * torch.rand(count * boxes, 2, generator=generator)
    centre = extent / 2 + torch.rand(count * boxes, 2, generator=generator) * (1 - extent)
    return {
        "img": torch.rand(count, 3, size, size, generator=generator),
        "bboxes": torch.cat((centre, extent), 1),
        "cls": torch.randint(20, (count * boxes, 1), generator=generator).float(),
        "batch_idx": torch.arange(count).repeat_interleave(boxes).float(),
    }


def save_yolo(model: nn.Module, file: Path) -> Path:
    """Write a checkpoint that Ultralytics, and the callback, can load."""
    torch.save({"model": model, "train_args": {}, "epoch": -1}, file)
    return file


def retinanet(backbone: str, size: int, classes: int = 20) -> nn.Module:
    """A torchvision RetinaNet on P3 to P7 whose transform leaves images of ``size`` as they are."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    body = resnet_fpn_backbone(
        backbone_name=backbone,
        weights=None,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    return RetinaNet(body, classes, min_size=size, max_size=size)
