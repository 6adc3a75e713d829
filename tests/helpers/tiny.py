"""Small models with a neck of three levels, for tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())


class TinyNeck(nn.Module):
    """Top-down and bottom-up, so that levels feed each other as in a YOLO neck."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.out = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for width in widths)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(widths[:-1], widths[1:], strict=True))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        levels = [self.out[0](features[0])]
        for number, down in enumerate(self.down, start=1):
            levels.append(self.out[number](features[number] + down(levels[-1])))
        return levels


class TinyHead(nn.Module):
    """One prediction map per level, as one dict of flat tensors."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(width, 5, 1) for width in widths)

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        maps = [head(feature).flatten(2) for head, feature in zip(self.heads, features, strict=True)]
        return {"scores": torch.cat(maps, 2)}


class TinyDetector(nn.Module):
    """Backbone to stride 8, 16 and 32 (or what ``first`` makes of it), neck, head."""

    def __init__(self, widths: tuple[int, ...] = (8, 12, 16), first: int = 8) -> None:
        super().__init__()
        self.stem = block(3, widths[0], first)
        steps = zip(widths[:-1], widths[1:], strict=True)
        self.stages = nn.ModuleList(block(a, b, 2) for a, b in steps)
        self.neck = TinyNeck(widths)
        self.head = TinyHead(widths)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = [self.stem(images)]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return self.head(self.neck(features))


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give the batch normalisations statistics, so that features in eval mode have a natural size."""
    generator = torch.Generator().manual_seed(seed)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(2, 3, 64, 64, generator=generator))
    return model


def batch(seed: int = 0, count: int = 2, size: int = 64) -> tuple[Tensor, list[Tensor]]:
    """Images (count, 3, size, size) and three pixel boxes for each."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, size, size, generator=generator)
    corners = torch.rand(count, 3, 2, 2, generator=generator).sort(dim=2).values * size
    return images, list(corners.flatten(2))
