"""The drawn data set: always the same, labelled rightly, and hard in the ways it is meant to be."""

from __future__ import annotations

import json
import zlib
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fgd_hooks.study.scenes import CLASSES, DISTRACTORS, SceneBox, SceneSettings, draw_scene, make_dataset
from fgd_hooks.study.scenes import _Shape as Shape
from fgd_hooks.study.scenes import _visible_boxes as visible_boxes

SETTINGS = SceneSettings(train=24, val=12, size=96)

# The first training image of the default settings: checksum of its pixels, and (class, x1, y1, x2, y2) of its boxes.
PIXELS = 3565549135
LABELS = [
    (0, 24, 39, 66, 81),
    (1, 11, 83, 47, 118),
    (3, 25, 39, 40, 53),
    (5, 82, 15, 116, 49),
    (5, 13, 114, 42, 144),
    (2, 67, 12, 80, 25),
    (4, 110, 106, 145, 141),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("scenes"), SETTINGS).parent


def scene(index: int, settings: SceneSettings = SETTINGS) -> tuple[Image.Image, list[SceneBox]]:
    """Image ``index`` of the training split."""
    return draw_scene(np.random.default_rng([settings.seed, 0, index]), settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_same_seed_same_bytes(dataset: Path, tmp_path: Path) -> None:
    assert contents(make_dataset(tmp_path, SETTINGS).parent) == contents(dataset)


def test_pixels_are_the_same_on_every_machine() -> None:
    # If this fails after a change of the drawing, raise DRAWING in scenes.py and put the new number here.
    image, boxes = scene(0, SceneSettings())
    assert zlib.crc32(np.asarray(image).tobytes()) == PIXELS
    assert [(b.label, b.x1, b.y1, b.x2, b.y2) for b in boxes] == LABELS


def test_another_seed_and_another_index_draw_something_else() -> None:
    other = SceneSettings(train=24, val=12, size=96, seed=1)
    first = np.asarray(scene(0)[0])
    assert not np.array_equal(first, np.asarray(scene(0, other)[0]))
    assert not np.array_equal(first, np.asarray(scene(1)[0]))


def test_an_image_does_not_depend_on_how_many_there_are(dataset: Path, tmp_path: Path) -> None:
    fewer = make_dataset(tmp_path, SceneSettings(train=3, val=2, size=96)).parent
    for name in ("images/train/0002.png", "labels/train/0002.txt", "images/val/0001.png"):
        assert (fewer / name).read_bytes() == (dataset / name).read_bytes()


@pytest.mark.parametrize("split", ["train", "val"])
def test_labels_are_valid_and_equal_to_the_coco_file(dataset: Path, split: str) -> None:
    coco = json.loads((dataset / "annotations" / f"instances_{split}.json").read_text())
    assert [c["name"] for c in coco["categories"]] == list(CLASSES)
    assert len(coco["images"]) == len(list((dataset / "images" / split).iterdir())) == getattr(SETTINGS, split)
    for image in coco["images"]:
        with Image.open(dataset / "images" / split / image["file_name"]) as opened:
            assert opened.size == (image["width"], image["height"]) == (96, 96)
        rows = np.loadtxt((dataset / "labels" / split / image["file_name"]).with_suffix(".txt"), ndmin=2)
        assert len(rows) >= 1
        assert ((rows[:, 1:] >= 0) & (rows[:, 1:] <= 1)).all()
        left_top, right_bottom = rows[:, 1:3] - rows[:, 3:] / 2, rows[:, 1:3] + rows[:, 3:] / 2
        assert (left_top >= -1e-6).all() and (right_bottom <= 1 + 1e-6).all()
        own = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        assert [a["category_id"] - 1 for a in own] == rows[:, 0].astype(int).tolist()
        boxes = np.array([a["bbox"] for a in own])
        np.testing.assert_allclose(np.concatenate([left_top, right_bottom - left_top], 1) * 96, boxes, atol=1e-3)
        assert all(a["area"] == a["bbox"][2] * a["bbox"][3] > 0 for a in own)
    assert len({a["id"] for a in coco["annotations"]}) == len(coco["annotations"])


def test_every_class_is_in_both_splits(dataset: Path) -> None:
    for split in ("train", "val"):
        coco = json.loads((dataset / "annotations" / f"instances_{split}.json").read_text())
        assert {a["category_id"] for a in coco["annotations"]} == set(range(1, len(CLASSES) + 1))


def test_both_formats_are_read_alike(dataset: Path) -> None:
    from fgd_hooks.evaluation.readers import read_data

    ours = read_data(dataset / "data.yaml", "train")
    theirs = read_data(dataset / "annotations" / "instances_train.json")
    assert ours.names == theirs.names == CLASSES
    for a, b in zip(ours.images, theirs.images, strict=True):
        assert a.labels.tolist() == b.labels.tolist()
        np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-3)


def test_scenes_are_hard() -> None:
    settings = SceneSettings()
    scenes = [scene(index, settings)[1] for index in range(60)]
    boxes = [box for found in scenes for box in found]
    sides = np.array([max(b.x2 - b.x1, b.y2 - b.y1) for b in boxes])
    assert np.quantile(sides, 0.95) > 3 * np.quantile(sides, 0.05)  # sizes vary widely
    assert 0.2 < np.mean(sides < 24) < 0.6  # many are smaller than three cells of stride 8
    assert 0.1 < np.mean([b.visible < 0.95 for b in boxes]) < 0.5  # partly covered
    assert min(b.visible for b in boxes) >= 0.3
    assert np.mean([any(overlap(a, b) for a, b in combinations(found, 2)) for found in scenes]) > 0.4
    border = [b.x1 == 0 or b.y1 == 0 or b.x2 == settings.size or b.y2 == settings.size for b in boxes]
    assert 0.05 < np.mean(border) < 0.4  # cut by the border


def overlap(a: SceneBox, b: SceneBox) -> bool:
    return min(a.x2, b.x2) > max(a.x1, b.x1) and min(a.y2, b.y2) > max(a.y1, b.y1)


def test_distractors_are_drawn_but_not_labelled() -> None:
    settings = SceneSettings(distractors=0)
    calm = [scene(index, settings)[1] for index in range(5)]
    assert all(box.label < len(CLASSES) for boxes in calm for box in boxes)
    with_distractor = [Shape(kind, 50, 50, 20, 0.0, 0.5) for kind in DISTRACTORS]
    masks = [np.ones((96, 96), dtype=bool)] * len(with_distractor)
    assert visible_boxes(with_distractor, masks) == []


def test_boxes_are_tight_around_what_is_visible() -> None:
    lower, upper = np.zeros((40, 40), dtype=bool), np.zeros((40, 40), dtype=bool)
    lower[10:20, 10:30] = True
    upper[5:30, 20:35] = True  # covers the right half of the lower one
    shapes = [Shape("square", 20, 15, 10, 0.0, 0.5), Shape("disc", 27, 17, 10, 0.0, 0.5)]
    assert visible_boxes(shapes, [lower, upper]) == [
        SceneBox(CLASSES.index("square"), 10, 10, 20, 20, 0.5),
        SceneBox(CLASSES.index("disc"), 20, 5, 35, 30, 1.0),
    ]


def test_a_shape_that_is_nearly_covered_gets_no_box() -> None:
    lower, upper = np.zeros((40, 40), dtype=bool), np.zeros((40, 40), dtype=bool)
    lower[10:20, 10:30] = True
    upper[5:30, 15:35] = True  # leaves a quarter
    for kind in ("disc", "hexagon"):  # a shape without a class covers just as well
        shapes = [Shape("square", 20, 15, 10, 0.0, 0.5), Shape(kind, 27, 17, 10, 0.0, 0.5)]
        assert [box.label for box in visible_boxes(shapes, [lower, upper])] == [0] * (kind == "disc")


def test_drawn_once_and_again_only_when_unfinished_or_different(tmp_path: Path) -> None:
    settings = SceneSettings(train=2, val=1, size=64)
    make_dataset(tmp_path, settings)
    image = tmp_path / "images" / "train" / "0000.png"
    original = image.read_bytes()
    image.write_bytes(b"touched")
    make_dataset(tmp_path, settings)
    assert image.read_bytes() == b"touched"
    (tmp_path / "scenes.json").unlink()  # as after an interruption
    make_dataset(tmp_path, settings)
    assert image.read_bytes() == original
    make_dataset(tmp_path, SceneSettings(train=1, val=1, size=64, seed=5))
    assert image.read_bytes() != original
    assert not (tmp_path / "images" / "train" / "0001.png").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train": 0}, "at least 1 image"),
        ({"size": 100}, "multiple of 32"),
        ({"objects": (5, 3)}, "least <= greatest"),
        ({"distractors": -1}, "distractors"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SceneSettings(**values)  # type: ignore[arg-type]
