"""Lay out images and boxes that were read as a temporary data set for Ultralytics, without copying the images."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np

from fgd_hooks.evaldata.types import EvalData


def linked_copy(
    truth: EvalData, to_model: dict[int, int], names: dict[int, str], folder: Path, channels: int
) -> tuple[Path, dict[str, int]]:
    """Lay out a data set of links in YOLO format; returns its yaml and the index of the image by file name."""
    images, labels = folder / "images", folder / "labels"
    images.mkdir()
    labels.mkdir()
    position = {}
    for index, image in enumerate(truth.images):
        name = f"{index:08d}"
        link = images / f"{name}{image.file.suffix.lower()}"
        link_file(image.file.resolve(), link)
        position[link.name] = index
        scale = np.array([image.width, image.height, image.width, image.height], dtype=np.float64)
        corners = np.concatenate([image.boxes[:, :2], image.boxes[:, :2] + image.boxes[:, 2:]], axis=1) / scale
        corners = corners.clip(0.0, 1.0)  # a row outside would make Ultralytics leave out the whole image
        rows = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1)
        lines = [
            f"{to_model[int(label)]} " + " ".join(f"{value:.9f}" for value in row)
            for label, row, crowd in zip(image.labels, rows, image.crowd, strict=True)
            if not crowd
        ]
        (labels / f"{name}.txt").write_text("\n".join(lines))
    lines = [f"path: {folder.resolve().as_posix()}", "train: images", "val: images", f"channels: {channels}", "names:"]
    lines += [f"  {index}: {json.dumps(name)}" for index, name in sorted(names.items())]
    file = folder / "data.yaml"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file, position


def link_file(source: Path, link: Path) -> None:
    """A symbolic link; where the system allows none, a hard link or a copy."""
    for make in (os.symlink, os.link, shutil.copyfile):
        try:
            make(source, link)
        except OSError:
            continue
        return
    raise OSError(f"cannot link or copy {source} to {link}")
