import math

import numpy as np
import pytest
import torch

pytest.importorskip("ultralytics")

from fgd_hooks.errors import TaskError
from fgd_hooks.integrations.ultralytics.boxes import boxes_of, mask_boxes_of
from fgd_hooks.masks import box_masks
from tests.helpers.yolo_data import make, rectangle


def batch_of(boxes, images, height, width, owner=None):
    return {
        "img": torch.zeros(images, 3, height, width),
        "bboxes": torch.tensor(boxes),
        "batch_idx": torch.tensor(owner or [0.0] * len(boxes)),
    }


def normalised(x, y, w, h, angle, height, width):
    """A rotated box as Ultralytics has it in a batch."""
    return [x / width, y / height, w / width, h / height, angle]


# rotated boxes


@pytest.mark.parametrize(
    ("angle", "expected"),
    [
        (0.0, [80, 40, 120, 60]),
        (math.pi / 2, [90, 30, 110, 70]),
        (
            math.pi / 4,
            [100 - 15 * math.sqrt(2), 50 - 15 * math.sqrt(2), 100 + 15 * math.sqrt(2), 50 + 15 * math.sqrt(2)],
        ),
        (math.pi, [80, 40, 120, 60]),
        (-math.pi / 2, [90, 30, 110, 70]),
    ],
)
def test_a_rotated_box_on_an_image_that_is_not_square(angle, expected):
    """40 wide and 20 high around (100, 50) in 300 x 100 pixels."""
    packed = boxes_of(batch_of([normalised(100, 50, 40, 20, angle, 100, 300)], 1, 100, 300))
    torch.testing.assert_close(packed.boxes, torch.tensor([expected]).float(), rtol=0, atol=1e-3)


def test_rotated_boxes_enclose_their_corners():
    random = np.random.default_rng(0)
    height, width = 96, 160
    given = [(*random.uniform(20, 80, 2), *random.uniform(2, 60, 2), random.uniform(-3.2, 3.2)) for _ in range(50)]
    packed = boxes_of(batch_of([normalised(*box, height, width) for box in given], 1, height, width))
    corners = np.stack([rectangle(*box) for box in given])
    expected = np.concatenate([corners.min(1), corners.max(1)], axis=1)
    torch.testing.assert_close(packed.boxes, torch.tensor(expected).float(), rtol=0, atol=1e-3)


def test_rotated_boxes_follow_a_resized_batch():
    """multi_scale enlarges the images alone, by one factor."""
    box = normalised(100, 50, 40, 20, 0.6, 128, 320)
    one, two = (boxes_of(batch_of([box], 1, size, size * 5 // 2)).boxes for size in (128, 192))
    torch.testing.assert_close(two, one * 1.5)


def test_a_batch_without_rotated_boxes():
    empty = {**batch_of([[0.5] * 5], 2, 64, 64), "bboxes": torch.zeros(0, 5), "batch_idx": torch.zeros(0)}
    assert len(boxes_of(empty)) == 0


# boxes from masks


def segments(overlap):
    """Two images of 32 x 64 pixels with masks of 8 x 16 cells.

    The first holds an L, partly hidden by a small bar, a bar, and one that shows nowhere; the second none; the third a
    single cell in the last corner.
    """
    shape, bar, nothing, corner = (torch.zeros(8, 16, dtype=torch.uint8) for _ in range(4))
    shape[1:7, 2:4] = 1
    shape[5:7, 2:9] = 1
    bar[0:3, 2:4] = 1
    corner[7, 15] = 1
    batch = batch_of([[0.5, 0.5, 0.5, 0.5]] * 3 + [[0.9, 0.9, 0.1, 0.1]], 3, 32, 64, owner=[0.0, 0.0, 0.0, 2.0])
    if overlap:
        first = torch.where(bar > 0, 2, shape)  # the number of an instance; small ones are drawn over large ones
        batch["masks"] = torch.stack([first, nothing, corner])
    else:
        batch["masks"] = torch.stack([shape, bar, nothing, corner]).float()
    return batch


@pytest.mark.parametrize("overlap", [True, False])
def test_boxes_around_masks(overlap):
    packed = mask_boxes_of(segments(overlap), overlap)
    top = 12 if overlap else 4  # the bar covers the L's rows 1 and 2; a cell is 4 pixels
    expected = [[8.0, top, 36, 28], [8, 0, 16, 12], [16, 8, 48, 24], [60, 28, 64, 32]]
    torch.testing.assert_close(packed.boxes, torch.tensor(expected))
    assert packed.image.tolist() == [0, 0, 0, 2]
    assert packed.num_images == 3


@pytest.mark.parametrize("overlap", [True, False])
def test_masks_follow_a_resized_batch(overlap):
    batch = segments(overlap)
    small = mask_boxes_of(batch, overlap).boxes
    batch["img"] = torch.zeros(3, 3, 48, 96)
    torch.testing.assert_close(mask_boxes_of(batch, overlap).boxes, small * 1.5)


def test_as_many_instances_as_images():
    """The shape of the masks alone does not tell which kind they are."""
    batch = batch_of([[0.5, 0.5, 1.0, 1.0]] * 2, 2, 32, 32, owner=[1.0, 1.0])
    masks = torch.zeros(2, 8, 8)
    masks[0, 2, 3] = 1
    masks[1, 4:6, 5] = 1
    assert mask_boxes_of({**batch, "masks": masks}, False).boxes.tolist() == [[12, 8, 16, 12], [20, 16, 24, 24]]
    joined = torch.stack([torch.zeros(8, 8), masks[0] + 2 * masks[1]])
    assert mask_boxes_of({**batch, "masks": joined}, True).boxes.tolist() == [[12, 8, 16, 12], [20, 16, 24, 24]]


@pytest.mark.parametrize("overlap", [True, False])
def test_a_batch_without_instances(overlap):
    batch = {**batch_of([[0.5] * 4], 2, 32, 32), "bboxes": torch.zeros(0, 4), "batch_idx": torch.zeros(0)}
    batch["masks"] = torch.zeros(2 if overlap else 0, 8, 8)
    assert len(mask_boxes_of(batch, overlap)) == 0


def test_masks_that_do_not_fit():
    batch = segments(True)
    with pytest.raises(TaskError, match="3 masks.*expected 4, one for each instance"):
        mask_boxes_of(batch, False)
    del batch["masks"]
    with pytest.raises(TaskError, match="holds no masks.*boxes_from=labels"):
        mask_boxes_of(batch, True)


# real training batches with Ultralytics' augmentation, against the pixels

AUGMENTED = {"degrees": 30.0, "scale": 0.3, "translate": 0.1, "fliplr": 0.5, "flipud": 0.5, "mosaic": 0.5, "hsv_v": 0.0}


def training_batch(task, folder, count=12, **settings):
    """One batch of ``count`` images as Ultralytics' trainer loads them, with augmentation."""
    from ultralytics.cfg import get_cfg
    from ultralytics.data import build_yolo_dataset
    from ultralytics.data.utils import check_det_dataset
    from ultralytics.utils.torch_utils import init_seeds

    init_seeds(0)
    data = check_det_dataset(str(make(folder, task, train=count, size=(128, 96))))
    args = get_cfg(overrides={"task": task, "imgsz": 128, **AUGMENTED, **settings})
    dataset = build_yolo_dataset(args, data["train"], count, data, mode="train")
    batch = dataset.collate_fn([dataset[number] for number in range(count)])
    return {**batch, "img": batch["img"].float() / 255}


def objects(image):
    """Pixel boxes and sizes of the white patches of an image (3, H, W) that do not touch its border."""
    import cv2

    white = (image.mean(0) > 0.6).numpy().astype(np.uint8)
    height, width = white.shape
    found = []
    for x, y, w, h, area in cv2.connectedComponentsWithStats(white)[2][1:]:
        if x > 0 and y > 0 and x + w < width and y + h < height and area > 20:
            found.append([x, y, x + w, y + h])
    return np.array(found, dtype=float).reshape(-1, 4)


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("detect", {"degrees": 0.0}),
        ("pose", {"degrees": 0.0}),
        ("obb", {}),
        ("segment", {}),
        ("segment", {"overlap_mask": True}),
        ("segment", {"overlap_mask": False}),
    ],
    ids=lambda value: str(value),
)
def test_boxes_of_augmented_batches_lie_on_their_objects(tmp_path, task, settings):
    """Each white patch inside an image has a box that fits it to some pixels, and foreground at its centre.

    A detector's boxes grow when they are turned, so these are not turned.
    """
    batch = training_batch(task, tmp_path / task, **settings)
    overlap = settings.get("overlap_mask")
    packed = boxes_of(batch) if overlap is None else mask_boxes_of(batch, overlap)
    foreground = box_masks(packed, 32, 32)[0]  # cells of 4 pixels
    checked = 0
    for number, image in enumerate(batch["img"]):
        boxes = packed.boxes[packed.image == number].numpy()
        for patch in objects(image):
            distance = np.abs(boxes - patch).max(1).min()
            assert distance <= 4, (number, patch, boxes)
            centre = patch.reshape(2, 2).mean(0)
            assert foreground[number, int(centre[1] // 4), int(centre[0] // 4)] > 0
            checked += 1
    assert checked >= 10
    # and away from all objects there is none
    share = float((foreground > 0).float().mean())
    assert 0.02 < share < 0.6
