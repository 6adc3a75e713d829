"""Tiny data sets for Ultralytics' tasks: white rectangles, turned by any angle, on dark noise, and their labels."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw

CLASSES = ("narrow", "wide")
CORNERS = 4


def rectangle(x: float, y: float, width: float, height: float, angle: float) -> np.ndarray:
    """The corners (4, 2), in order, of a rectangle with its centre at x, y, turned by an angle in radians."""
    offsets = np.array([[-width, -height], [width, -height], [width, height], [-width, height]]) / 2
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return np.array([x, y]) + offsets @ turn


def label(task: str, kind: int, corners: np.ndarray, size: tuple[int, int]) -> str:
    """A line of a label file; ``size`` is (width, height) of the image, ``corners`` are pixels."""
    shares = corners / np.array(size)
    low, high = shares.min(0), shares.max(0)
    box = [*((low + high) / 2), *(high - low)]
    numbers = {
        "detect": box,
        "segment": shares.ravel(),
        "obb": shares.ravel(),
        "pose": [*box, *(value for x, y in shares for value in (x, y, 2))],
    }[task]
    return " ".join([str(kind), *(f"{number:.6f}" for number in numbers)])


def make(folder: Path, task: str, *, train: int = 12, val: int = 4, size: tuple[int, int] = (96, 96)) -> Path:
    """Draw a data set for a task; returns its yaml file. No two rectangles of an image touch."""
    random = np.random.default_rng(0)
    width, height = size
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(count):
            image = Image.fromarray(random.integers(0, 60, (height, width, 3), dtype=np.uint8))
            lines = []
            for place in random.permutation(4)[: random.integers(1, 4)]:
                x, y = (place % 2 + 0.5) * width / 2, (place // 2 + 0.5) * height / 2
                kind = int(random.integers(2))
                long = random.uniform(0.28, 0.4) * min(size)
                corners = rectangle(x, y, long, long / (3 - 1.5 * kind), random.uniform(0, math.pi))
                ImageDraw.Draw(image).polygon([tuple(corner) for corner in corners], fill=(255, 255, 255))
                lines.append(label(task, kind, corners, size))
            image.save(folder / "images" / split / f"{number}.png")
            (folder / "labels" / split / f"{number}.txt").write_text("\n".join(lines))
    content = {"path": str(folder), "train": "images/train", "val": "images/val", "names": dict(enumerate(CLASSES))}
    if task == "pose":
        content |= {"kpt_shape": [CORNERS, 3], "flip_idx": list(range(CORNERS))}
    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump(content))
    return file
