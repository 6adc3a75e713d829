"""FGD written down slowly from the paper's equations: one loop per image and box, no shortcut. Only for tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def slow_masks(boxes, canvas, height, width, dtype=torch.float64):
    """Foreground and background weights (N, H, W), cell by cell."""
    foreground = torch.zeros(len(boxes), height, width, dtype=dtype)
    background = torch.zeros(len(boxes), height, width, dtype=dtype)
    for n, of_image in enumerate(boxes):
        h, w = canvas[n]
        for box in of_image.float():
            scaled = torch.stack(
                [box[0] / w * width, box[1] / h * height, box[2] / w * width, box[3] / h * height]
            ).tolist()
            if not all(abs(v) < 1e9 for v in scaled):
                raise ValueError("the reference takes finite boxes")
            left, top = (max(0, int(torch.tensor(v).floor())) for v in scaled[:2])
            right, bottom = (int(torch.tensor(v).ceil()) for v in scaled[2:])
            if right < left or bottom < top:
                continue
            weight = torch.tensor(1, dtype=dtype) / (bottom + 1 - top) / (right + 1 - left)
            for row in range(top, min(bottom, height - 1) + 1):
                for column in range(left, min(right, width - 1) + 1):
                    foreground[n, row, column] = max(foreground[n, row, column], weight)
        outside = [(r, c) for r in range(height) for c in range(width) if foreground[n, r, c] == 0]
        for row, column in outside:
            background[n, row, column] = 1 / len(outside)
    return foreground, background


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
