"""FGD written down slowly from the paper's equations: one loop per image and box, no shortcut. Only for tests."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def slow_masks(boxes, canvas, height, width, dtype=torch.float64):
    """Foreground and background weights (N, H, W), cell by cell."""
    foregrounds, backgrounds = [], []
    for of_image, (h, w) in zip(boxes, canvas, strict=True):
        size = torch.tensor([w, h, w, h], dtype=torch.float32)
        cells = torch.tensor([width, height, width, height], dtype=torch.float32)
        foreground = [[0.0] * width for _ in range(height)]
        for box in (of_image.float().reshape(-1, 4) / size * cells).tolist():
            left, top = (max(0, math.floor(v)) for v in box[:2])
            right, bottom = (math.ceil(v) for v in box[2:])
            for row in range(top, min(bottom, height - 1) + 1):
                for column in range(left, min(right, width - 1) + 1):
                    area = (bottom + 1 - top) * (right + 1 - left)
                    foreground[row][column] = max(foreground[row][column], 1 / area)
        outside = sum(value == 0 for row in foreground for value in row)
        foregrounds.append(foreground)
        backgrounds.append([[1 / outside if value == 0 else 0.0 for value in row] for row in foreground])
    return torch.tensor(foregrounds, dtype=dtype), torch.tensor(backgrounds, dtype=dtype)


def slow_attention(feature, temperature):
    """Spatial (N, H, W) and channel (N, C) attention."""
    n, c, h, w = feature.shape
    spatial = F.softmax(feature.abs().mean(1).view(n, -1) / temperature, 1).view(n, h, w) * h * w
    channel = F.softmax(feature.abs().mean(3).mean(2) / temperature, 1) * c
    return spatial, channel


def slow_context(feature, block):
    """R(F) with convolutions on (N, C, 1, 1), as the paper draws it."""
    n, c, h, w = feature.shape
    weights = F.softmax(F.conv2d(feature, block.attend.weight.view(1, c, 1, 1)).view(n, h * w), 1)
    pooled = (feature * weights.view(n, 1, h, w)).sum((2, 3), keepdim=True)
    hidden = F.conv2d(pooled, block.reduce.weight[:, :, None, None], block.reduce.bias)
    shape = (c // 2, 1, 1)
    hidden = F.layer_norm(hidden, shape, block.norm.weight.view(shape), block.norm.bias.view(shape), 1e-5)
    return feature + F.conv2d(F.relu(hidden), block.expand.weight[:, :, None, None], block.expand.bias)


def slow_fgd(loss, student, teacher, boxes, canvas):
    """The four unweighted parts of ``loss`` (an FGDLoss) by name."""
    n, _, height, width = student.shape
    foreground, background = slow_masks(boxes, canvas, height, width, student.dtype)
    spatial_s, channel_s = slow_attention(student, loss.temperature)
    spatial_t, channel_t = slow_attention(teacher, loss.temperature)
    square = (teacher - student) ** 2 * spatial_t[:, None] * channel_t[:, :, None, None]
    attention = (spatial_s - spatial_t).abs().sum() + (channel_s - channel_t).abs().sum()
    relation = slow_context(teacher, loss.teacher_context) - slow_context(student, loss.student_context)
    return {
        "foreground": (square * foreground[:, None]).sum() / n,
        "background": (square * background[:, None]).sum() / n,
        "attention": attention / n,
        "global": (relation**2).sum() / n,
    }
