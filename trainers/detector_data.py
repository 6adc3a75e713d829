"""Images and boxes of COCO format for the detector trainers, and the COCO metrics of a detector."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from detector_settings import DataSettings, ImageSettings
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from fgd_hooks.errors import DataError
from fgd_hooks.evaluation.coco_metrics import CocoMetrics, coco_metrics
from fgd_hooks.evaluation.dataset import EvalData, Floats, open_image
from fgd_hooks.evaluation.readers import read_data

Target = dict[str, Tensor]
SPLITS = ("train", "val", "test")


def read_splits(settings: DataSettings) -> dict[str, EvalData]:
    """The images and boxes of each split that the settings name.

    Raises:
        FileNotFoundError: a json or an image is missing.
        DataError: a file is malformed, or the splits have different classes.
    """
    root, found = Path(settings.root), {}
    for split in SPLITS:
        file, images = getattr(settings, split), getattr(settings, f"{split}_images")
        if file is not None:
            found[split] = read_data(root / file, images=None if images is None else root / images)
    for data in found.values():
        if data.names != found["train"].names:
            raise DataError(
                f"{data.source} has the classes {', '.join(data.names)}, {found['train'].source} "
                f"{', '.join(found['train'].names)}; expected the same ones in the same order of ids."
            )
    return found


class Detections(Dataset[tuple[Tensor, Target]]):
    """Images (3, H, W) from 0 to 1 with ``boxes`` (n, 4), pixel x1 y1 x2 y2, and ``labels`` (n,) from 1 up.

    Args:
        data: what was read; crowd regions are left out.
        flips: for training: how often images are mirrored; None: never.
    """

    def __init__(self, data: EvalData, flips: ImageSettings | None = None) -> None:
        self.images = data.images
        self.flips = flips

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[Tensor, Target]:
        """One image and its target."""
        true = self.images[number]
        image = pil_to_tensor(open_image(true.file)).float() / 255
        boxes = torch.from_numpy(true.boxes[~true.crowd]).float().reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.from_numpy(true.labels[~true.crowd]) + 1
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)  # torchvision refuses boxes without an area
        boxes, labels = boxes[kept], labels[kept]
        if self.flips is not None:
            across, down = torch.rand(2).tolist()
            if across < self.flips.flip:
                image = image.flip(2)
                boxes[:, [0, 2]] = image.shape[2] - boxes[:, [2, 0]]
            if down < self.flips.flip_vertical:
                image = image.flip(1)
                boxes[:, [1, 3]] = image.shape[1] - boxes[:, [3, 1]]
        return image, {"boxes": boxes, "labels": labels}


def as_lists(batch: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """A batch as torchvision's detectors take it; for ``DataLoader(collate_fn=...)``."""
    return [image for image, _ in batch], [target for _, target in batch]


@torch.no_grad()
def evaluate(
    model: nn.Module, data: EvalData, device: torch.device, batch: int, *, rank: int = 0, world: int = 1
) -> CocoMetrics:
    """The COCO metrics of a torchvision detector; every process looks at its share of the images.

    Args:
        model: a detector; it is in eval mode meanwhile, and back in its own mode afterwards.
        data: the images.
        device: of the model.
        batch: images per forward pass.
        rank: of this process.
        world: number of processes; all of them must call this, and all get the result.
    """
    mode, images, own = model.training, Detections(data), range(rank, len(data.images), world)
    found: dict[int, Floats] = {}
    model.eval()
    try:
        for start in range(0, len(own), batch):
            numbers = own[start : start + batch]
            results = model([images[number][0].to(device) for number in numbers])
            for number, result in zip(numbers, results, strict=True):
                rows = torch.column_stack([result["boxes"], result["scores"], result["labels"] - 1])
                rows[:, 2:4] -= rows[:, :2]
                found[number] = rows.double().cpu().numpy().reshape(-1, 6)
    finally:
        model.train(mode)
    if world > 1:
        shares: list[dict[int, Floats]] = [{} for _ in range(world)]
        torch.distributed.all_gather_object(shares, found)
        found = {number: rows for share in shares for number, rows in share.items()}
    return coco_metrics(data, [np.asarray(found[number]) for number in range(len(data.images))])
